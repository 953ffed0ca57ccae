"""benchmark/judge.py against servers on localhost: perfect judges of every manner, and servers that fail."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmark import judge

KEY = "sk-a-very-secret-key"


def says(content, finish_reason="stop", **more):
    """The reply of a server whose model says content; more: of the message."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content} | more, "finish_reason": finish_reason}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]})


class Server:
    """Chat completions at url; answer(prompt, number of the request) gives a text, or (status, headers, body)."""

    def __init__(self, answer):
        self.requests, self.waits, outer = [], [], self  # requests: (headers, body) of each

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(({name.lower(): x for name, x in self.headers.items()}, body))
                reply = answer(body["messages"][0]["content"], len(outer.requests))
                status, headers, text = reply if isinstance(reply, tuple) else says(reply)
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def do_GET(self):  # what is left of a request that was sent on
                outer.requests.append(({name.lower(): x for name, x in self.headers.items()}, None))
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that did not wait for its answer
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    """Starts servers, which end with the test; the client's waits are listed instead of waited."""
    servers = []
    for name in ("http_proxy", "HTTP_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def start(answer):
        servers.append(Server(answer))
        monkeypatch.setattr(time, "sleep", servers[-1].waits.append)
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def write_run(folder, num=5, script="sppo_rlhf_tldr", quality="good", prompts="post"):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": script, "args": {}}))
    rows = [
        {"index": i, "prompt": f"{prompts} {i}\nTL;DR:", "response": f"a {quality} summary of {i}",
         "reference": f"a mediocre summary of {i} by a human being", "score": 0.5}
        for i in range(num)
    ]  # fmt: skip
    (folder / "eval_samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(prompt):
    """What stands under A and under B."""
    return re.search(r" A:\n(.*)\n\n\w+ B:\n(.*)\n\nAnswer", prompt, re.DOTALL).groups()


def prefer(*words, manner="{0}"):
    """A perfect judge: the earlier one of words wins, wherever it stands; manner: winner {0} and loser {1} in words."""

    def answer(prompt, _):
        a, b = (min((i for i, word in enumerate(words) if word in text), default=9) for text in options(prompt))
        return manner.format("A", "B") if a < b else manner.format("B", "A")

    return answer


def run(run_dir, server, *flags, model="judge"):
    return judge.main([str(run_dir), "--judge-url", server.url, "--judge-model", model, *flags])


def result(run_dir, name="judge.json"):
    return json.loads((run_dir / name).read_text())


def judgments(run_dir, name="judgments-judge-reference.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def test_a_perfect_judge_and_what_it_is_asked(tmp_path, serve, capsys):
    server = serve(prefer("good", "mediocre", "bad"))
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad", quality="bad")
    assert run(good, server) == run(bad, server) == 0
    expected = {"win_rate": 1, "win_rate_se": 0, "judge_model": "judge", "against": "reference", "samples": 5}
    assert result(good) == expected | {"unparsed": 0, "chose_a": 0.5} and result(bad)["win_rate"] == 0
    output = capsys.readouterr().out
    assert f"10 requests to judge at {server.url}: 2 for each of 5 samples;" in output
    assert "win rate against reference: 100.0 ± 0.0 % of 5 samples\n" in output
    headers, body = server.requests[0]
    assert "authorization" not in headers
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 16)
    prompt = body["messages"][0]["content"]
    assert prompt.startswith("Below is a post, and two summaries of it.") and "Post:\npost 0\n\nSummary A:\n" in prompt
    assert options(prompt) == ("a good summary of 0", "a mediocre summary of 0 by a human being")
    assert options(server.requests[1][1]["messages"][0]["content"]) == options(prompt)[::-1]


MANNERS = ["{0}", "{1}: good. {0}: better. Answer: {0}", "<think>{1}?</think>Summary {0} is better."]
UNUSABLE = ["A: 3/10, B: 8/10", "A) too long, B) short, B", "**A** is weaker than **B**", "Neither summary A"]


@pytest.mark.parametrize("manner", MANNERS)
def test_a_judge_that_prefers_the_reference_scores_0(tmp_path, serve, manner):
    run_dir = write_run(tmp_path / "run")
    server = serve(prefer("mediocre", "good", manner=manner))
    assert run(run_dir, server) == 0 and len(server.requests) == 10
    assert (result(run_dir)["win_rate"], result(run_dir)["win_rate_se"], result(run_dir)["chose_a"]) == (0, 0, 0.5)


def test_an_unusable_answer_is_asked_for_again_and_its_sample_does_not_count(tmp_path, serve, capsys):
    good, words = prefer("good", "mediocre"), UNUSABLE[0]
    server = serve(lambda prompt, number: words if number in (1, 2) or "post 3" in prompt else good(prompt, number))
    run_dir = write_run(tmp_path / "run", num=5)
    assert run(run_dir, server) == 0 and len(server.requests) == 10 + 3
    verdict = result(run_dir)
    assert (verdict["win_rate"], verdict["samples"], verdict["unparsed"], verdict["chose_a"]) == (1, 3, 3, 3 / 7)
    assert [m["content"] for m in server.requests[1][1]["messages"][1:]] == [words, judge.REMINDER]
    output = capsys.readouterr()
    assert "3 of 10 answers were neither A nor B; their samples do not count" in output.out
    assert output.err == "warning: above a tenth of the answers is unusable; try --structured or another judge\n"
    assert run(run_dir, server) == 0 and len(server.requests) == 13  # nor is it asked for a third time
    capsys.readouterr()
    run_dir = write_run(tmp_path / "second", num=2)
    assert run(run_dir, serve(lambda prompt, number: words if number % 2 else good(prompt, 0))) == 0
    assert (result(run_dir)["win_rate"], result(run_dir)["unparsed"]) == (1, 0) and not capsys.readouterr().err
    run_dir = write_run(tmp_path / "none", num=2)
    assert run(run_dir, serve(lambda *_: words)) == 1 and not (run_dir / "judge.json").exists()
    error = capsys.readouterr().err
    assert f"no sample was judged in both orders (last: {words}" in error and error.count("\n") == 1


def test_both_orders_cancel_position_bias(tmp_path, serve):
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, serve(lambda *_: "A")) == 0
    assert (result(run_dir)["win_rate"], result(run_dir)["win_rate_se"], result(run_dir)["chose_a"]) == (0.5, 0, 1)


LETTERS = {  # texts, between bars
    "A": "A| a\n|(A)|\uff21|## Verdict: **A**|The better one is summary A.|I prefer summary A.",
    "B": "B.|\uff22\u3002|A: good. B: better. Answer: B|**Answer:** B\n\n---|A\nB|B wins.|"
    '[THINK]Summary A\nis long.[/THINK]B|Summary B is better. It is short.|```json\n{"answer": "B"}\n```',
    None: "|A or B|A/B|a or b|neither A nor B|Both are bad|A better summary would be shorter|A. It is shorter than B.|"
    "B\nbecause A is long|Summary B is better than Summary A.|Summary A is long.|Continuation B, not continuation A|"
    "I wouldn't say summary A|I don\u2019t choose A|A: 8\nB: 3|A: better\nB: good|The weaker one is A.|Answer: A or B|"
    '{"A": 3,\n"B": 8}|{"winner": "B",\n"loser": "A"}|\u4e0d\u662fB|<think>\nLet me look at Summary A|'
    + "|".join(UNUSABLE),
}


@pytest.mark.parametrize("letter", LETTERS)
def test_answers(letter):
    assert [text for text in LETTERS[letter].split("|") if judge.parse(text) != letter] == []


def test_continuations_are_compared_by_sentiment_at_like_lengths(tmp_path, serve):
    server = serve(prefer("good", "mediocre"))
    run_dir = write_run(tmp_path / "run", script="sppo_rlhf_imdb")
    path = run_dir / "eval_samples.jsonl"
    path.write_text(path.read_text().replace("a good summary of 4", "a good and long summary of 4"))
    assert run(run_dir, server, "--max-tokens", "0", "--judge-samples", "2") == 0 and len(server.requests) == 4
    prompt = server.requests[0][1]["messages"][0]["content"]
    assert "more positive" in prompt and "Continuation A:\na good summary of 0\n" in prompt
    assert options(prompt)[1] == "a mediocre summary of 0 by a"  # as many words as the longest response
    assert server.requests[0][1].keys() == {"model", "messages"}  # judges that think take nothing else
    assert run(run_dir, server, "--structured") == 0 and len(server.requests) == 10  # nothing twice
    assert server.requests[-1][1]["response_format"]["json_schema"]["schema"] == judge.ANSWER


def test_against_another_run(tmp_path, serve, capsys):
    server = serve(prefer("good", "bad"))
    sppo, ppo = write_run(tmp_path / "sppo" / "seed1"), write_run(tmp_path / "ppo" / "seed1", quality="bad")
    assert run(sppo, server, "--against", str(ppo)) == 0
    verdict = result(sppo, "judge-ppo-seed1.json")
    assert (verdict["win_rate"], verdict["against"]) == (1, str(ppo)) and not (sppo / "judge.json").exists()
    assert len(judgments(sppo, "judgments-judge-ppo-seed1.jsonl")) == 10
    assert run(ppo, server, "--against", str(sppo)) == 0 and result(ppo, "judge-sppo-seed1.json")["win_rate"] == 0
    capsys.readouterr()
    other = write_run(tmp_path / "other", prompts="question")
    assert run(sppo, server, "--against", str(other)) == 2
    assert capsys.readouterr().err == f"error: {sppo} and {other} were evaluated on different prompts\n"


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Summary A is long."}]}
FORMS = [  # of a reply, its letter, and the text that is kept
    (says([THINKING, {"type": "text", "text": "B"}]), "B", "B"),
    (says([{"type": "reasoning", "text": "Summary A"}, {"type": "output_text", "text": "B."}]), "B", "B."),
    (says([{"type": "text", "text": "The better is "}, {"type": "text", "text": "B."}]), "B", "The better is B."),
    (says("B", "length", reasoning_content="Summary A is long."), "B", "B"),
    (says("B", refusal=None, tool_calls=[]), "B", "B"),
    (says(None, refusal="I'm sorry, but I cannot."), None, "I'm sorry, but I cannot."),
    ((200, {}, '{"choices": [{"message": {"role": "assistant"}, "finish_reason": "tool_calls"}]}'), None, ""),
    (says([THINKING]), None, ""),
    ("<think>Hm.</think>", None, "<think>Hm.</think>"),
]


@pytest.mark.parametrize(("reply", "letter", "said"), FORMS)
def test_forms_of_an_answer(tmp_path, serve, reply, letter, said):
    """A judge that declines is no error: it is asked once more, and no empty message goes back."""
    again = letter is None
    server = serve(lambda prompt, number: reply if number < 2 + again else "A")
    run_dir = write_run(tmp_path / "run", num=2)
    assert run(run_dir, server) == 0 and len(server.requests) == 4 + again
    assert [judgment["answer"] for judgment in judgments(run_dir)] == [letter, "A", "A", "A"]
    assert judgments(run_dir)[0]["text"] == said
    assert len(server.requests[1][1]["messages"]) == (3 if "sorry" in said else 1)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (says(None, "length", reasoning_content="Okay, let me"), "nothing but thoughts"),
        (says("Okay, let me look at Summary A", "length"), "Okay, let me look at Summary A"),
    ],
)
def test_an_answer_that_was_cut_off_is_none(tmp_path, serve, capsys, reply, words):
    run_dir = write_run(tmp_path / "run", num=2)
    assert run(run_dir, serve(lambda *_: reply)) == 1
    error = capsys.readouterr().err
    assert f"cut off at --max-tokens 16 before it had come to A or B ({words}): 0 leaves" in error
    assert error.count("\n") == 1 and not judgments(run_dir)
    server = serve(lambda prompt, number: reply if number < 3 else "A")  # of the endpoint's own length
    assert run(run_dir, server, "--max-tokens", "0") == 0 and result(run_dir)["unparsed"] == 1


def test_failures_that_pass_are_waited_out(tmp_path, serve):
    soon = formatdate(time.time() + 100, usegmt=True)
    failures = [(429, {}, "slow down"), (503, {}, ""), (500, {}, "{}"), (429, {"Retry-After": "20"}, "[]")]
    failures += [(503, {"Retry-After": soon}, ""), (200, {}, '{"error": {"message": "GPU lost", "code": 502}}')]
    server = serve(lambda p, n: failures[n - 1] if n <= len(failures) else prefer("good", "mediocre")(p, n))
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, server) == 0 and result(run_dir)["win_rate"] == 1 and len(server.requests) == 16
    assert server.waits[0] < server.waits[1] < server.waits[2] < 20 == server.waits[3]
    assert server.waits[4] == pytest.approx(100, abs=30)


def test_a_server_that_keeps_failing_loses_nothing(tmp_path, serve, capsys):
    failing = serve(lambda prompt, number: (500, {}, f'{{"error": "overloaded {KEY}"}}') if number > 3 else "A")
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, failing, "--retries", "8") == 1 and len(failing.waits) == 8
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "overloaded" in error and "the same command goes on" in error
    day = serve(lambda *_: (429, {"Retry-After": "86400"}, '{"error": "Daily limit"}'))
    assert run(run_dir, day) == 1 and day.waits == [] and "Daily limit" in capsys.readouterr().err
    server = serve(lambda *_: "A")
    assert run(run_dir, server) == 0 and len(server.requests) == 7 and result(run_dir)["win_rate"] == 0.5


def test_a_slow_answer_is_asked_for_again(tmp_path, serve):
    done = threading.Event()
    server = serve(lambda prompt, number: (done.wait(60) if number == 1 else None, "B")[1])
    run_dir = write_run(tmp_path / "run", num=1)
    assert run(run_dir, server, "--timeout", "2") == 0 and len(server.requests) == 3 and len(server.waits) == 1
    done.set()
    assert (result(run_dir)["samples"], result(run_dir)["win_rate_se"]) == (1, None)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((401, {}, json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}})), "Incorrect API key: ***"),
        ((404, {}, json.dumps({"error": {"message": "The model judge does not exist"}})), "judge does not exist"),
        ((400, {}, "not\nJSON"), "not JSON"),
        ((400, {}, json.dumps({"error": "x" * 290 + KEY})), "x***"),
        ((200, {"Content-Type": "text/html"}, "<html>Welcome</html>"), "chat completions does: <html>Welcome"),
        ((200, {}, '{"choices": null, "detail": "Not here"}'), "Not here"),
        ((200, {}, '["A"]'), "chat completions does: ['A']"),
        ((200, {}, ""), "chat completions does: nothing"),
        (says(5), "chat completions does: {"),
    ],
)
def test_errors_of_the_endpoint_are_one_line_without_the_key(tmp_path, serve, capsys, monkeypatch, reply, words):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda *_: reply)
    assert run(write_run(tmp_path / "run"), server) == 1 and len(server.requests) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1 and KEY[:6] not in error


def test_errors_of_the_input_are_one_line(tmp_path, serve, capsys, monkeypatch):
    server = serve(lambda *_: "A")
    run_dir, control = write_run(tmp_path / "run"), write_run(tmp_path / "control", script="sppo_atari")
    broken = write_run(tmp_path / "broken")
    (broken / "eval_samples.jsonl").write_text('{"index": 0}\n')
    full = write_run(tmp_path / "full")
    (full / "judgments-judge-reference.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(judge, "read_judgments", lambda path: {})  # which would read zeros without an end
    for code, args, message in (
        (2, [tmp_path, "--judge-url", server.url], "no finished run"),
        (2, [control, "--judge-url", server.url], "sppo_atari.py, which is no language script"),
        (2, [broken, "--judge-url", server.url], "cannot be read"),
        (2, [run_dir, "--judge-url", server.url, "--against", tmp_path / "nowhere"], "no finished run"),
        (2, [run_dir, "--judge-url", "localhost:8000"], "is no http or https address"),
        (2, [run_dir, "--judge-url", server.url, "--judge-samples", "0"], "--judge-samples must be above 0"),
        (1, [run_dir, "--judge-url", "http://127.0.0.1:9/v1"], "Connection error. [Errno 111] Connection refused"),
        (1, [full, "--judge-url", server.url], "No space left on device"),
    ):
        assert judge.main([*map(str, args), "--judge-model", "judge"]) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nand more")
    assert run(run_dir, server) == 2 and KEY not in capsys.readouterr().err


def test_the_key_goes_to_the_endpoint_and_nowhere_else(tmp_path, serve, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    elsewhere = serve(lambda *_: "A")
    location = {"Location": f"{elsewhere.url.replace('127.0.0.1', 'localhost')}/chat/completions"}
    server = serve(lambda prompt, n: (302, location, "") if n > 11 else f"A was told {KEY}" if n in (1, 2) else "A")
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, server) == 0
    assert {headers["authorization"] for headers, _ in server.requests} == {f"Bearer {KEY}"}
    assert run(run_dir, server, model="other") == 1
    assert elsewhere.requests and all("authorization" not in headers for headers, _ in elsewhere.requests)
    assert all(KEY not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    output = capsys.readouterr()
    assert KEY not in output.out + output.err


def test_a_dry_run_asks_nothing_and_what_was_judged_is_not_asked_again(tmp_path, serve, capsys):
    server = serve(prefer("good", "mediocre", "bad"))
    run_dir = write_run(tmp_path / "run", num=150)
    assert run(run_dir, server, "--dry-run") == 0
    assert "200 requests" in capsys.readouterr().out and not server.requests
    for samples, model, requests in ((2, "judge", 4), (5, "judge", 10), (5, "judge", 10), (5, "other/judge", 20)):
        assert run(run_dir, server, "--judge-samples", str(samples), model=model) == 0
        assert len(server.requests) == requests and result(run_dir)["samples"] == samples
    assert (run_dir / "judgments-other-judge-reference.jsonl").exists()
    path = run_dir / "eval_samples.jsonl"
    path.write_text(path.read_text().replace("good summary of 3", "bad summary of 3"))
    assert run(run_dir, server, "--judge-samples", "5") == 0
    assert len(server.requests) == 22 and result(run_dir)["win_rate"] == pytest.approx(0.8)
    rows = judgments(run_dir)  # one that an older version read otherwise is asked for anew
    rows[0]["text"] = UNUSABLE[0]
    (run_dir / "judgments-judge-reference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(run_dir, server, "--judge-samples", "5") == 0 and len(server.requests) == 23


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_judge_goes_on_where_it_was(tmp_path, serve, number):
    go = threading.Event()
    server = serve(lambda prompt, request: (go.wait(30) if request == 4 else None, "A")[1])
    run_dir = write_run(tmp_path / "run")
    command = [sys.executable, judge.__file__, str(run_dir)]
    command += ["--judge-url", f"{server.url}/chat/completions/", "--judge-model", "judge"]
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    # A shell starts what it runs in the background with SIGINT ignored, which children inherit.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while len(server.requests) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        threading.Event().wait(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    go.set()
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), error
    assert number == signal.SIGKILL or "stopped; the same command goes on" in error
    path = run_dir / "judgments-judge-reference.jsonl"
    assert len(judgments(run_dir)) == 3
    path.write_text(path.read_text() + '{"id": "cut sh')  # as a kill in the middle of a write leaves it
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 requests") and "3 judged before" in done.stdout
    assert len(server.requests) == 4 + 7 and len(judgments(run_dir)) == 10
    assert result(run_dir)["win_rate"] == 0.5
