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
import html
import json
import math
import os
import re
import socket
import ssl
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, InvalidURL
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
THOUGHT = r"</think(?:ing)?>|\[/THINK\]"  # where what a judge thinks ends, if its server does not take it out
LONGEST_WAIT = 60  # seconds between two attempts, unless the endpoint asks for more
LONGEST_ASKED = 600  # an endpoint that asks for more ends the command


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file that a full disk or a lack of rights keeps from being written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


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


def parse(text: str, cut: bool = False) -> str | None:
    """The letter, where the text is A or B, begins with it ("A. Because") or ends so ("the answer is A"); else None.

    An ending counts only where the other letter and words of denial do not occur: not in "B is better than summary A".
    Nor does that of a text that was cut off.
    """
    text = re.split(THOUGHT, text)[-1]
    if re.search(r"<think|\[THINK\]", text):  # a thought that has no end
        return None
    clear = r"(?!.*\b(?i:not|neither|nor|never|cannot|than|over)\b|.*n't\b)(?!.*\bA\b.*\bB\b)(?!.*\bB\b.*\bA\b)"
    last_words = rf"(?s:{clear})(?is:.*\b(?:answer|summary|continuation)\W+(?:is\W+)?)([AB])\W*$"
    patterns = [r"(?i:\W*([AB])\W*$)", r"\W*([AB])[.:)*\n]"] + ([] if cut else [last_words])
    for pattern in patterns:
        if match := re.match(pattern, text):
            return match[1].upper()
    return None


def read_answer(body: str) -> tuple[str, bool] | None:
    """What the judge said in the body of a reply, and whether it was cut off; None where the body is no answer.

    Of a content in parts, those of thinking are left out. A judge that declined may have said why.
    """
    try:
        choice = json.loads(body)["choices"][0]
        message, content = choice["message"], choice["message"].get("content")
        texts = []
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, dict):
                said = part.get("type", "text") in ("text", "output_text", "refusal")
                part = (part.get("text") or part.get("refusal")) if said else None
            texts.append(part or "")
        text = "".join(texts) or message.get("refusal") or ""
        return None if choice.get("error") else (text, choice.get("finish_reason") == "length")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def read_error(body: str) -> tuple[int | None, str]:
    """The code, where there is one, and the server's own words in the body of a reply that is no answer."""
    try:
        content = json.loads(body)
    except ValueError:
        is_html = body.lstrip().startswith("<")
        return None, html.unescape(re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", body)) if is_html else body
    try:
        content = content[0] if isinstance(content, list) else content  # Google's
        in_choice = content["choices"][0].get("error") if content.get("choices") else None  # OpenRouter's
        error = content.get("error") or in_choice or content
        if isinstance(error, str):
            return None, error
        code, words, more = str(error.get("code")), error["message"], error.get("metadata")  # more: of whom it asked
        words += f" {json.dumps(more)}" if more else ""
        return int(code) if re.fullmatch(r"[45]\d\d", code) else None, words
    except (LookupError, TypeError, AttributeError):
        return None, body


def asked_wait(headers: HTTPMessage) -> float:
    """Seconds that an endpoint asks to wait, given as such or as a date; 0 without a request."""
    text = headers.get("Retry-After", "")
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return 0


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

    def one_line(self, text: str) -> str:
        """The beginning of what a server says, without the key."""
        text = "".join(letter if letter.isprintable() else " " for letter in self.hide_key(text))
        return " ".join(text.split())[:300]

    def post(self, body: dict) -> tuple[int, str, HTTPMessage, str]:
        """Status, its name, headers and body of the endpoint's reply, which may be an error."""
        request = Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")  # for this server alone
        try:
            with urlopen(request, timeout=self.args.timeout) as response:
                return response.status, response.reason, response.headers, response.read().decode(errors="replace")
        except HTTPError as error:
            try:
                text = error.read(100_000).decode(errors="replace")
            except (OSError, HTTPException):
                text = ""
            return error.code, error.reason, error.headers, text

    def complete(self, messages: list[dict]) -> tuple[str, bool]:
        """The model's answer, and whether it was cut off; after a failure that may pass, another attempt."""
        body = {"model": self.args.judge_model, "messages": messages}
        if self.args.max_tokens:  # judges that think take neither
            body |= {"max_tokens": self.args.max_tokens, "temperature": 0}
        for attempt in range(self.args.retries + 1):
            wait = min(2**attempt, LONGEST_WAIT)
            try:
                status, reason, headers, text = self.post(body)
            except (OSError, HTTPException, ValueError) as error:  # the last: of an address
                reason = getattr(error, "reason", error)
                problem = f"{type(reason).__name__}: {self.one_line(str(reason))}"
                lasting = ConnectionRefusedError, socket.gaierror, ssl.SSLError, InvalidURL, ValueError
                lasts = isinstance(reason, lasting)
                require(self.reached or not lasts, f"{self.url} cannot be reached ({problem}): is the server running?")
            else:
                self.reached = True
                if status < 300 and (answer := read_answer(text)):
                    self.answered = True
                    return answer
                code, words = read_error(text)  # some servers send an error, and its code, under status 200
                problem = self.one_line(f"HTTP {status} {reason}: {words.strip() or 'nothing'}")
                code = code if status < 300 else status
                key = f"OPENAI_API_KEY is {'' if self.key else 'not '}set"
                require(code not in (401, 403), f"{self.url}: {problem} ({key})")
                unknown = f"{self.url} does not answer as a chat-completions endpoint does: {problem}"
                require(code is not None or self.answered, unknown)
                sent = re.search(r"\bmax_tokens\b|\btemperature\b", words)
                hint = " (--max-tokens 0 sends neither max_tokens nor temperature)" if sent else ""
                require(code in (None, 408, 409, 429) or code >= 500, f"{self.url}: {problem}{hint}")
                wait = max(wait, asked_wait(headers))
                if wait > LONGEST_ASKED:
                    raise RunError(f"{self.url} asks to wait {wait:.0f} seconds: {problem}")
            if attempt < self.args.retries:
                time.sleep(wait)
        raise RunError(f"{self.url} failed {self.args.retries + 1} times, at last with {problem}")

    def judge(self, text: str) -> tuple[str | None, str]:
        """The letter, None if a second answer has none either, and the answer.

        Raises InputError where that one was cut off at --max-tokens: a judge that was still thinking has not judged.
        """
        messages = [{"role": "user", "content": text}]
        answer, cut = self.complete(messages)
        if parse(answer, cut) is None:
            said = re.split(THOUGHT, answer)[-1].strip()
            if said:  # some servers refuse an empty message, and two of one side
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": REMINDER}]
            answer, cut = self.complete(messages)
        letter, longest = parse(answer, cut), self.args.max_tokens
        thinking = f"an answer was cut off at --max-tokens {longest} before it had come to A or B"
        thinking += f" ({self.one_line(answer) or 'nothing but thoughts'}): 0 leaves its length to the endpoint"
        require(letter or not cut or not longest, thinking)
        return letter, self.hide_key(answer)


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
        "chose_a": answers.count("A") / len(answers),  # 0.5 without position bias
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
    with writing(path), path.open("a") as file:
        for done, name in enumerate(missing, 1):
            index, ours_first, text = wanted[name]
            letter, answer = judge.judge(text)
            score = 0.5 if letter is None else float((letter == "A") == ours_first)
            kept[name] = {"id": name, "index": index, "ours_first": ours_first, "answer": letter}
            kept[name] |= {"score": score, "text": answer}
            file.write(json.dumps(kept[name]) + "\n")
            file.flush()
            progress.show(done)
    judged = [kept[name] for name in wanted]
    none = f"none of {len(judged)} answers was A or B, the last one: {judge.one_line(judged[-1]['text']) or 'nothing'}"
    require(any(judgment["answer"] for judgment in judged), f"{none}; to ask again, move {path} away")
    summary = result(args, judged)
    out = args.run_dir / ("judge.json" if args.against == "reference" else f"judge-{against}.json")
    temporary = out.with_name(out.name + ".tmp")
    with writing(out):
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
        message, code = f"error: {error}; the judgments before it are kept, the same command goes on", 1
    except KeyboardInterrupt:
        message, code = "\nstopped; the same command goes on", 130
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
