"""Win rate of a finished language run, by a judge model behind any OpenAI-compatible chat-completions endpoint.

    python benchmark/judge.py RUN_DIR --judge-url https://api.openai.com/v1 --judge-model gpt-4-turbo-2024-04-09
    python benchmark/judge.py RUN_DIR --judge-url http://localhost:8000/v1 --judge-model NAME --against PPO_RUN_DIR

The judge sees a prompt of RUN_DIR/eval_samples.jsonl with the run's response and the reference (Table 3), or another
run's response to the same prompt (the paper's introduction), once in each order, since judges favour a position. The
key, where the endpoint needs one, comes from the environment variable OPENAI_API_KEY. Every judgment is kept in
RUN_DIR/judgments-<model>-<against>.jsonl as it comes: the same command again asks only what is missing. The result is
RUN_DIR/judge.json, against another run RUN_DIR/judge-<run>.json.
"""

import hashlib
import json
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import tyro

try:
    import openai
    import pandas as pd
    from tqdm import tqdm
except ModuleNotFoundError as error:
    print(f"error: there is no {error.name}: pip install -r requirements-benchmark.txt", file=sys.stderr)
    sys.exit(2)

TASKS = {  # what is asked, and the names of the prompt and of what is compared
    "sppo_rlhf_imdb": (
        "Below is the beginning of a movie review, and two continuations of it. Which continuation is the more "
        "positive about the movie, while it fits the beginning?",
        "Beginning",
        "Continuation",
    ),
    "sppo_rlhf_tldr": (
        "Below is a post, and two summaries of it. Which summary is the better one: which one tells more of what is "
        "important in the post, correctly, briefly and in clear language?",
        "Post",
        "Summary",
    ),
}
REMINDER = "Answer with one letter only: A or B."
ANSWER = {"type": "object", "properties": {"answer": {"enum": ["A", "B"]}}, "required": ["answer"]}
STRUCTURED = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": ANSWER}}
THOUGHT = r"</think(?:ing)?>|\[/THINK\]"  # where what a judge thinks ends, if its server does not take it out
CHOOSES = r"""(?x) \b[AB]\W*$
    | \b[AB]\b\W*(wins | is\b.*\b(better|best|preferable|preferred|stronger|superior|winner)\b)
    | (?i:answer|choice|choose|pick|prefer|select|verdict|winner)\b.*\b[AB]\b"""
# Words with which a sentence that names one letter may still mean the other one, or none.
DENIES = r"""(?ix)n.t\b | \b(no|not|none|never|neither|nor|cannot|both|either|tied?|equal(ly)?|than|over|worse|worst
    |weak(er|est)?|poor(er|est)?|inferior|los(es|er|t)|less|least|lacks?|fails?|bad|wrong|dislike|reject|against|unlike
    |if|unless|but|except|although|though|however|instead|rather|could|should)\b"""


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]  # finished run of a language script
    judge_url: str  # endpoint, with or without /chat/completions at its end: http://localhost:8000/v1
    judge_model: str  # model that judges, as the endpoint calls it
    judge_samples: int = 100  # samples to judge at most, the first ones; each costs two requests
    against: str = "reference"  # "reference", or the directory of another run on the same prompts
    max_tokens: int = 16
    """tokens of an answer at most; 0: these and the temperature as the endpoint has them, for judges that think"""
    structured: bool = False
    """ask the endpoint for an answer that can only be A or B, by response_format; not every endpoint can"""
    retries: int = 6
    """attempts after a failed one, with growing waits, or those that the endpoint asks for up to two minutes"""
    timeout: float = 60.0  # seconds to wait for an answer
    dry_run: bool = False  # print the number of requests and ask nothing


def read_samples(run_dir: Path) -> tuple[str, list[tuple[int, str, str, str]]]:
    """Script of a run, and (index, prompt, response, reference) of its samples. Raises ValueError without them."""
    path, empty = run_dir / "eval_samples.jsonl", "(empty)"
    try:
        script = json.loads((run_dir / "args.json").read_text())["script"]
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        prompts = [row["prompt"].removesuffix("TL;DR:").strip() for row in rows]
        texts = [(row["response"].strip() or empty, row["reference"].strip() or empty) for row in rows]
        samples = [(row["index"], prompt, *text) for row, prompt, text in zip(rows, prompts, texts)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        samples = []
    if not samples:
        raise ValueError(f"{run_dir} is no finished run of a language script: {path} or args.json cannot be read")
    if script not in TASKS:
        raise ValueError(f"{run_dir} is a run of {script}.py, which is no language script")
    return script, samples


def questions(args: Args) -> dict[str, tuple[int, bool, str]]:
    """{id: (index of the sample, ours comes first, question)}; the id changes with whatever the judge sees."""
    script, samples = read_samples(args.run_dir)
    longest = max(len(ours.split()) for _, _, ours, _ in samples)
    samples = samples[: args.judge_samples]
    theirs = [reference for *_, reference in samples]
    if args.against != "reference":
        others = read_samples(Path(args.against))[1][: args.judge_samples]
        if [sample[:2] for sample in samples] != [sample[:2] for sample in others]:
            raise ValueError(f"{args.run_dir} and {args.against} were evaluated on different prompts")
        theirs = [response for _, _, response, _ in others]
    elif script == "sppo_rlhf_imdb":  # the rest of a review is several times as long as what a run writes
        theirs = [" ".join(text.split()[:longest]) for text in theirs]
    task, prompt_name, name = TASKS[script]
    asked = {}
    for (index, prompt, ours, _), their in zip(samples, theirs):
        for ours_first, a, b in ((True, ours, their), (False, their, ours)):
            text = f"{task}\n\n{prompt_name}:\n{prompt}\n\n{name} A:\n{a}\n\n{name} B:\n{b}\n\n{REMINDER}"
            content = json.dumps([args.judge_model, index, ours_first, text])
            asked[hashlib.sha256(content.encode()).hexdigest()[:16]] = (index, ours_first, text)
    return asked


def parse(text: str, cut: bool = False) -> str | None:
    """The letter, where the text is a letter, or its last line or last sentence chooses one and names no other.

    None for anything else; a text that was cut off has no last line.
    """
    text = unicodedata.normalize("NFKC", re.split(THOUGHT, text)[-1])  # of full-width letters
    if alone := re.fullmatch(r"[\W_]*([ABab])[\W_]*", text):
        return alone[1].upper()
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    if cut or not lines or re.search(r"<think|\[THINK\]", text):  # a thought that has no end
        return None
    line = re.sub(r"[*_`]", "", lines[-1]).strip()
    for part in (line, re.split(r"(?<=[.!?;])\s+", line)[-1]):
        letters = set(re.findall(r"\b[AB]\b", part))
        if len(letters) == 1 and re.search(CHOOSES, part) and not re.search(DENIES, part):
            return letters.pop()
    return None


def api_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def hide_key(text: str) -> str:
    """text without the key, which some servers repeat in what they say."""
    return text.replace(api_key() or "\0", "***")


def mark_errors(response) -> None:
    """Some servers send an error under status 200: the client tries again as after any other."""
    response.read()
    if response.status_code == 200 and re.match(r'\s*{\s*"error"\s*:\s*[{"]', response.text):
        response.status_code = 502


def connect(args: Args) -> openai.OpenAI:
    key, url = api_key(), args.judge_url.rstrip("/").removesuffix("/chat/completions")
    if not re.match(r"https?://[^/]", url):
        raise ValueError(f"--judge-url {args.judge_url} is no http or https address")
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY has characters that no key has")
    http = openai.DefaultHttpxClient(event_hooks={"response": [mark_errors]})
    options = {"max_retries": args.retries, "timeout": args.timeout, "http_client": http}
    return openai.OpenAI(base_url=url, api_key=key or "none", **options)


def complete(client: openai.OpenAI, **request) -> tuple[str, bool]:
    """What the judge said, and whether it was cut off. Raises RuntimeError where the reply is no chat completion."""
    try:
        reply = client.chat.completions.create(**request)
    except json.JSONDecodeError as error:
        reply = error.doc or "nothing"
    try:
        choice = reply.choices[0]
        content = choice.message.content or getattr(choice.message, "refusal", None) or ""
        if isinstance(content, list):  # parts, of which those of thinking are left out
            content = "".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))
        return content.strip(), choice.finish_reason == "length"
    except (AttributeError, LookupError, TypeError):
        parsed = isinstance(reply, openai.BaseModel)
        said = reply.model_dump_json(exclude_none=True, warnings=False) if parsed else reply
        raise RuntimeError(f"the endpoint does not answer as one for chat completions does: {said}") from None


def ask(client: openai.OpenAI, args: Args, question: str) -> tuple[str | None, str]:
    """The letter, None where a second answer has none either, and that answer.

    Raises RuntimeError where that one was cut off at --max-tokens: a judge that was still thinking has not judged.
    """
    options = {"max_tokens": args.max_tokens, "temperature": 0} if args.max_tokens else {}
    if args.structured:
        options["response_format"] = STRUCTURED
    if not api_key():
        options["extra_headers"] = {"Authorization": openai.Omit()}
    messages = [{"role": "user", "content": question}]
    for _ in range(2):
        text, cut = complete(client, model=args.judge_model, messages=messages, **options)
        if letter := parse(text, cut):
            return letter, text
        if said := re.split(THOUGHT, text)[-1].strip():  # some servers refuse an empty message
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": REMINDER}]
    if cut and args.max_tokens:
        what = f"an answer was cut off at --max-tokens {args.max_tokens} before it had come to A or B"
        raise RuntimeError(f"{what} ({text or 'nothing but thoughts'}): 0 leaves its length to the endpoint")
    return None, text


def read_judgments(path: Path) -> dict[str, dict]:
    """Judgments kept so far, by id, but those whose letter would not be read from their text any more."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):  # cut short by a kill
        path.write_text("".join(lines := lines[:-1]))
    try:
        kept = {row["id"]: row for row in map(json.loads, lines)}
        return {key: row for key, row in kept.items() if row["answer"] in (None, parse(row["text"]))}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} cannot be read; move it away to begin again") from None


def summarize(args: Args, judged: list[dict]) -> dict:
    """The share of wins of the samples that were judged in both orders: one that each side won once counts a half."""
    usable = pd.DataFrame(judged).dropna(subset="answer")
    wins = ((usable.answer == "A") == usable.ours_first).groupby(usable["index"]).agg(["mean", "size"])
    shares = wins["mean"][wins["size"] > 1]
    return {
        "win_rate": shares.mean() if len(shares) else None,
        "win_rate_se": shares.sem() if len(shares) > 1 else None,
        "judge_model": args.judge_model,
        "against": args.against,
        "samples": len(shares),
        "unparsed": len(judged) - len(usable),
        "chose_a": (usable.answer == "A").mean() if len(usable) else None,  # 0.5 without position bias
    }


def run(args: Args) -> None:
    for name, least in (("judge_samples", 1), ("timeout", 1e-3), ("retries", 0), ("max_tokens", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {'above 0' if least else '0 or above'}")
    wanted, client = questions(args), connect(args)
    against = "reference" if args.against == "reference" else "-".join(Path(args.against).resolve().parts[-2:])
    model, against = (re.sub(r"[^\w.-]+", "-", text) for text in (args.judge_model, against))
    model, against = model[-60:], against[-170:]  # a file name has 255 characters
    path = args.run_dir / f"judgments-{model}-{against}.jsonl"
    kept = read_judgments(path)
    missing = [key for key in wanted if key not in kept]
    before = f", {len(wanted) - len(missing)} judged before" if len(missing) < len(wanted) else ""
    print(f"{len(missing)} requests to {args.judge_model} at {args.judge_url}: 2 for each of {len(wanted) // 2} samples"
          f"{before}; an answer that is neither A nor B is asked for once more", flush=True)  # fmt: skip
    if args.dry_run:
        return
    with path.open("a") as file:
        for key in tqdm(missing, unit=" judgments", disable=None):
            index, ours_first, text = wanted[key]
            letter, answer = ask(client, args, text)
            kept[key] = {"id": key, "index": index, "ours_first": ours_first}
            kept[key] |= {"answer": letter, "text": hide_key(answer)}
            print(json.dumps(kept[key]), file=file, flush=True)
    summary = summarize(args, [kept[key] for key in wanted])
    if summary["win_rate"] is None:
        last = " ".join(kept[key]["text"] for key in wanted if not kept[key]["answer"])[-200:]
        raise RuntimeError(f"no sample was judged in both orders (last: {last}); to ask again, move {path} away")
    out = args.run_dir / ("judge.json" if args.against == "reference" else f"judge-{against}.json")
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.replace(out)
    se = f" ± {100 * summary['win_rate_se']:.1f}" if summary["win_rate_se"] is not None else ""
    print(f"win rate against {args.against}: {100 * summary['win_rate']:.1f}{se} % of {summary['samples']} samples")
    if summary["unparsed"]:
        print(f"{summary['unparsed']} of {len(wanted)} answers were neither A nor B; their samples do not count")
    if summary["unparsed"] > len(wanted) / 10:
        print("warning: above a tenth of the answers is unusable; try --structured or another judge", file=sys.stderr)
    print(f"everything is in {out}")


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        run(args)
        return 0
    except (ValueError, OSError) as error:
        message, code = error, 2 if isinstance(error, ValueError) else 1
    except (openai.OpenAIError, RuntimeError) as error:
        words = error.response.text if isinstance(error, openai.APIStatusError) else error.__cause__ or ""
        message, code = f"{error} {words}", 1
    except KeyboardInterrupt:
        message, code = "stopped", 130
    line = " ".join(hide_key(str(message)).split())[:400]
    print(f"error: {line}" + ("; the same command goes on" if code != 2 else ""), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
