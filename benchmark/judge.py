"""Win rate of a finished language run, by a judge model behind any OpenAI-compatible chat-completions endpoint.

    python benchmark/judge.py RUN_DIR --judge-url https://api.openai.com/v1 --judge-model gpt-4-turbo-2024-04-09
    python benchmark/judge.py RUN_DIR --judge-url http://localhost:8000/v1 --judge-model NAME --against PPO_RUN_DIR

The judge sees a prompt of RUN_DIR/eval_samples.jsonl with the run's response and the reference (Table 3), or another
run's response to the same prompt (the paper's introduction), once in each order, since judges favour a position. The
key, where the endpoint needs one, comes from the environment variable OPENAI_API_KEY and goes nowhere but to the
endpoint. Every judgment is kept in RUN_DIR/judgments-<model>-<against>.jsonl as it comes: the same command again asks
only what is missing. The result is RUN_DIR/judge.json, against another run RUN_DIR/judge-<run>.json.
"""

import hashlib
import json
import math
import os
import re
import socket
import ssl
import statistics
import sys
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import tyro

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
LONGEST_WAIT = 60  # seconds between two attempts, unless the endpoint asks for more


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """finished run of a language script"""
    judge_url: str
    """endpoint, with or without /chat/completions at its end: http://localhost:8000/v1"""
    judge_model: str
    """model that judges, as the endpoint calls it"""
    judge_samples: int = 100
    """samples to judge at most, the first ones; each costs two requests"""
    against: str = "reference"
    """"reference", or the directory of another run on the same prompts"""
    max_tokens: int = 16
    """tokens of an answer at most; 0: these and the temperature as the endpoint has them, for judges that think"""
    retries: int = 6
    """attempts after a failed one, with waits of 1, 2, 4, ... seconds"""
    timeout: float = 60.0
    """seconds to wait for an answer"""
    dry_run: bool = False
    """print the number of requests and ask nothing"""


class InputError(ValueError):
    """Bad input: main() prints its one line and exits with code 2."""


class RunError(RuntimeError):
    """A judge that stopped answering: main() prints its one line and exits with code 1."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def read_samples(run_dir: Path) -> tuple[str, list[dict]]:
    """Script of a run and its evaluated samples."""
    path = run_dir / "eval_samples.jsonl"
    require(path.exists(), f"there is no {path}: a language run writes it when it has finished")
    try:
        script = json.loads((run_dir / "args.json").read_text())["script"]
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        texts = [sample[key] for sample in samples for key in ("prompt", "response", "reference")]
        assert texts and all(isinstance(text, str) for text in texts) and all("index" in sample for sample in samples)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise InputError(f"{path}, or the args.json beside it, cannot be read") from None
    require(script in TASKS, f"{run_dir} is a run of {script}.py, which is no language script")
    return script, samples


def read_pairs(args: Args) -> tuple[str, list[dict]]:
    """Script of the run, and what is compared: index, prompt, "ours" and "theirs" of every sample to judge."""
    script, samples = read_samples(args.run_dir)
    longest = max(len(sample["response"].split()) for sample in samples)
    samples = samples[: args.judge_samples]
    if args.against == "reference":
        theirs = [sample["reference"] for sample in samples]
        if script == "sppo_rlhf_imdb":  # the rest of a review is several times as long as what a run writes
            theirs = [" ".join(text.split()[:longest]) for text in theirs]
    else:
        others = read_samples(Path(args.against))[1][: args.judge_samples]
        prompts, other_prompts = ([(s["index"], s["prompt"]) for s in rows] for rows in (samples, others))
        require(prompts == other_prompts, f"{args.run_dir} and {args.against} were evaluated on different prompts")
        theirs = [sample["response"] for sample in others]
    return script, [
        {"index": s["index"], "prompt": s["prompt"].removesuffix("TL;DR:"), "ours": s["response"], "theirs": their}
        for s, their in zip(samples, theirs)
    ]


def question(script: str, pair: dict, ours_first: bool) -> str:
    task, prompt, answer = TASKS[script]
    ours, theirs = (pair[name].strip() or "(empty)" for name in ("ours", "theirs"))
    a, b = (ours, theirs) if ours_first else (theirs, ours)
    parts = (task, f"{prompt}:\n{pair['prompt'].strip()}", f"{answer} A:\n{a}", f"{answer} B:\n{b}", REMINDER)
    return "\n\n".join(parts)


def parse(text: str) -> str | None:
    """The letter, where the text is A or B, begins with it ("A. Because") or ends so ("the answer is A"); else None.

    An ending counts only where the other letter and words of denial do not occur: not in "B is better than summary A".
    """
    text = text.rpartition("</think>")[2]
    clear = r"(?!.*\b(?i:not|neither|nor|never|cannot|than|over)\b|.*n't\b)(?!.*\bA\b.*\bB\b)(?!.*\bB\b.*\bA\b)"
    last_words = rf"(?s:{clear})(?is:.*\b(?:answer|summary|continuation)\W+(?:is\W+)?)([AB])\W*$"
    for pattern in (r"(?i:\W*([AB])\W*$)", r"\W*([AB])[.:)*\n]", last_words):
        if match := re.match(pattern, text):
            return match[1].upper()
    return None


class Judge:
    """The model behind the endpoint."""

    def __init__(self, args: Args):
        require(re.match(r"https?://[^/]", args.judge_url), f"--judge-url {args.judge_url} is no http or https address")
        self.args, self.reached, self.answered = args, False, False
        self.url = args.judge_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        require(self.key.isascii() and self.key.isprintable(), "OPENAI_API_KEY has characters that no key has")

    def hide_key(self, text: str) -> str:
        """text without the key, which some servers repeat in what they say."""
        return text.replace(self.key, "***") if self.key else text

    def server_message(self, error: HTTPError) -> str:
        try:
            body = error.read(10_000).decode(errors="replace")
        except (OSError, HTTPException):
            body = ""
        try:
            content = json.loads(body)
            content = content.get("error", content)
            body = content if isinstance(content, str) else content["message"]
        except (ValueError, AttributeError, KeyError, TypeError):
            pass
        return f"HTTP {error.code} {error.reason}: {' '.join(str(body).split())[:300]}"

    def complete(self, messages: list[dict]) -> str:
        """The model's answer; after a failure that may pass, another attempt."""
        body = {"model": self.args.judge_model, "messages": messages}
        if self.args.max_tokens:  # judges that think take neither
            body |= {"max_tokens": self.args.max_tokens, "temperature": 0}
        for attempt in range(self.args.retries + 1):
            request = Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            if self.key:
                request.add_unredirected_header("Authorization", f"Bearer {self.key}")  # for this server alone
            wait = min(2**attempt, LONGEST_WAIT)
            try:
                with urlopen(request, timeout=self.args.timeout) as response:
                    content = json.load(response)["choices"][0]["message"]["content"]
                self.reached = self.answered = True
                return content or ""  # null: the judge declined
            except HTTPError as error:
                self.reached = True
                problem = self.hide_key(self.server_message(error))
                given = "is set and was refused" if self.key else "is not set"
                require(error.code not in (401, 403), f"{self.url}: {problem} (OPENAI_API_KEY {given})")
                require(error.code in (408, 409, 429) or error.code >= 500, f"{self.url}: {problem}")
                asked = error.headers.get("Retry-After", "")
                wait = max(wait, int(asked)) if asked.isdigit() else wait
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                problem = f"{type(reason).__name__}: {reason}"
                lasts = isinstance(reason, (ConnectionRefusedError, socket.gaierror, ssl.SSLError))
                require(self.reached or not lasts, f"{self.url} cannot be reached ({problem}): is the server running?")
            except (ValueError, LookupError, TypeError):  # no JSON, or an error in place of an answer
                require(self.answered, f"{self.url} does not answer as a chat-completions endpoint does")
                problem = "something that is no answer"
            if attempt < self.args.retries:
                time.sleep(wait)
        raise RunError(f"{self.url} failed {self.args.retries + 1} times, at last with {problem}")

    def judge(self, text: str) -> tuple[str | None, str]:
        """The letter, None if a second answer has none either, and the answer."""
        messages = [{"role": "user", "content": text}]
        answer = self.complete(messages)
        if parse(answer) is None:
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": REMINDER}]
            answer = self.complete(messages)
        return parse(answer), self.hide_key(answer)


def read_judgments(path: Path) -> dict[str, dict]:
    """Judgments kept so far, by id. A line cut short by a kill goes, so that the next one begins on its own."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        os.truncate(path, len(complete))
    try:
        return {judgment["id"]: judgment for judgment in map(json.loads, complete.splitlines())}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} cannot be read; move it away to begin again") from None


class Progress:
    """One line: redrawn in place on a terminal, printed at most every 30 seconds when output is redirected."""

    def __init__(self, total: int):
        self.total, self.begin, self.last = total, time.monotonic(), -math.inf

    def show(self, done: int) -> None:
        terminal, now = sys.stdout.isatty(), time.monotonic()
        if not terminal and now - self.last < 30 and done < self.total:
            return
        self.last, left = now, int((self.total - done) * (now - self.begin) / done)
        bar = f"[{'#' * int(20 * done / self.total):20}] " if terminal else ""
        line = f"{bar}{done} of {self.total} judgments  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        end = "" if terminal and done < self.total else "\n"
        print(f"\r{line}\x1b[K" if terminal else line, end=end, flush=True)


def result(args: Args, judgments: list[dict]) -> dict:
    """Mean over the samples of the mean score in both orders: a win is 1, a loss 0, no usable answer 0.5."""
    scores = {}
    for judgment in judgments:
        scores.setdefault(judgment["index"], []).append(judgment["score"])
    means = [statistics.mean(both) for both in scores.values()]
    answers = [judgment["answer"] for judgment in judgments if judgment["answer"]]
    return {
        "win_rate": statistics.mean(means),
        "win_rate_se": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        "judge_model": args.judge_model,
        "against": args.against,
        "samples": len(means),
        "unparsed": len(judgments) - len(answers),
        "chose_a": answers.count("A") / len(answers) if answers else None,  # 0.5 without position bias
    }


def run(args: Args) -> int:
    for name in ("judge_samples", "timeout"):
        require(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    for name in ("retries", "max_tokens"):
        require(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must be 0 or above, got {getattr(args, name)}")
    script, pairs = read_pairs(args)
    judge = Judge(args)
    resolved = Path(args.against).resolve()
    against = args.against if args.against == "reference" else f"{resolved.parent.name}-{resolved.name}"
    model, against = (re.sub(r"[^\w.-]+", "-", text) for text in (args.judge_model, against))
    model, against = model[-60:], against[-170:]  # a file name has 255 characters
    path = args.run_dir / f"judgments-{model}-{against}.jsonl"
    kept = read_judgments(path)
    wanted = {}  # {id: (index, ours first, question)}; the id changes with whatever the judge sees
    for pair in pairs:
        for ours_first in (True, False):
            text = question(script, pair, ours_first)
            content = json.dumps([args.judge_model, pair["index"], ours_first, text])
            wanted[hashlib.sha256(content.encode()).hexdigest()[:16]] = (pair["index"], ours_first, text)
    missing = [name for name in wanted if name not in kept]
    before = f", {len(wanted) - len(missing)} judged before" if len(missing) < len(wanted) else ""
    print(
        f"{len(missing)} requests to {args.judge_model} at {judge.url}: 2 for each of {len(pairs)} samples{before}; "
        "an answer that is neither A nor B is asked for once more",
        flush=True,
    )
    if args.dry_run:
        return 0
    progress = Progress(len(missing))
    with path.open("a") as file:
        for done, name in enumerate(missing, 1):
            index, ours_first, text = wanted[name]
            letter, answer = judge.judge(text)
            score = 0.5 if letter is None else float((letter == "A") == ours_first)
            kept[name] = {"id": name, "index": index, "ours_first": ours_first, "answer": letter}
            kept[name] |= {"score": score, "text": answer}
            file.write(json.dumps(kept[name]) + "\n")
            file.flush()
            progress.show(done)
    summary = result(args, [kept[name] for name in wanted])
    out = args.run_dir / ("judge.json" if args.against == "reference" else f"judge-{against}.json")
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(temporary, out)
    se = f" ± {100 * summary['win_rate_se']:.1f}" if summary["win_rate_se"] is not None else ""
    unparsed = f"; {summary['unparsed']} answers were neither A nor B and count as ties" if summary["unparsed"] else ""
    print(f"win rate against {args.against}: {100 * summary['win_rate']:.1f}{se} % of {len(pairs)} samples{unparsed}")
    print(f"  everything is in {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        return run(args)
    except InputError as error:
        message, code = f"error: {error}", 2
    except RunError as error:
        message, code = f"error: {error}; no judgment is lost, the same command goes on", 1
    except KeyboardInterrupt:
        message, code = "\nstopped; the same command goes on", 130
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
