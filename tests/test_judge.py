"""benchmark/judge.py against servers on localhost: a real language model, and scripted ones that fail in every way."""

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
from pathlib import Path

import pytest
import torch

from benchmark import judge

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-a-very-secret-key"


def says(content, finish_reason="stop", **more):
    """The reply of a server whose model says content; more: of the message."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content} | more, "finish_reason": finish_reason}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]})


def refuses(error, status=200, **headers):
    """The reply of a server with an error in its body."""
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps({"error": error})


class Server:
    """Chat completions at url; answer(prompt, number of the request) gives a text, or (status, headers, body)."""

    def __init__(self, answer):
        self.requests = []  # (headers, body) of each
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((dict(self.headers), body))
                reply = answer(body["messages"][0]["content"], len(outer.requests))
                status, headers, text = reply if isinstance(reply, tuple) else says(reply)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def do_GET(self):  # what is left of a request that was sent on
                outer.requests.append((dict(self.headers), None))
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that did not wait for its answer
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    """Starts servers, which end with the test; the judge's waits are listed instead of waited."""
    servers = []
    for name in ("http_proxy", "HTTP_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def start(answer):
        servers.append(Server(answer))
        servers[-1].waits = []
        monkeypatch.setattr(judge.time, "sleep", servers[-1].waits.append)
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def write_run(folder, num=5, script="sppo_rlhf_tldr", quality="good", prompts="post"):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": script, "args": {}}))
    rows = [
        {
            "index": i,
            "prompt": f"{prompts} {i}\nTL;DR:",
            "response": f"a {quality} summary of {i}",
            "reference": f"a mediocre summary of {i} by a human being",
            "score": 0.5,
        }
        for i in range(num)
    ]
    (folder / "eval_samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(prompt):
    """What stands under A and under B."""
    return re.search(r" A:\n(.*)\n\n\w+ B:\n(.*)\n\nAnswer", prompt, re.DOTALL).groups()


def prefer(*words):
    """A perfect judge: the earlier one of words wins, wherever it stands."""

    def answer(prompt, _):
        a, b = (min((i for i, word in enumerate(words) if word in text), default=9) for text in options(prompt))
        return "A" if a < b else "B"

    return answer


def run(run_dir, server, *flags, model="judge"):
    return judge.main([str(run_dir), "--judge-url", server.url, "--judge-model", model, *flags])


def result(run_dir, name="judge.json"):
    return json.loads((run_dir / name).read_text())


def judgments(run_dir, name="judgments-judge-reference.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def test_a_real_model_behind_a_real_server(tmp_path, serve):
    import tiny  # takes seconds

    torch.manual_seed(0)
    tokenizer = tiny.byte_level_tokenizer()
    model = tiny.gpt2(len(tokenizer), n_positions=1024).eval()
    letters = [tokenizer(letter).input_ids[0] for letter in "AB"]

    @torch.no_grad()
    def likelier(prompt):
        logprobs = model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1].log_softmax(-1)
        return "A" if logprobs[letters[0]] > logprobs[letters[1]] else "B"

    server = serve(lambda prompt, _: f" {likelier(prompt)}.\n")
    run_dir = write_run(tmp_path / "run", num=8)
    assert run(run_dir, server, "--judge-samples", "6") == 0
    assert len(server.requests) == 12
    _, pairs = judge.read_pairs(judge.Args(run_dir, server.url, "judge", judge_samples=6))
    scores = []
    for pair in pairs:
        first = likelier(judge.question("sppo_rlhf_tldr", pair, True)) == "A"
        second = likelier(judge.question("sppo_rlhf_tldr", pair, False)) == "B"
        scores.append((first + second) / 2)
    scores = torch.tensor(scores, dtype=torch.float64)
    verdict = result(run_dir)
    assert verdict.pop("win_rate") == pytest.approx(scores.mean().item())
    assert verdict.pop("win_rate_se") == pytest.approx(scores.std().item() / 6**0.5)
    assert 0 <= verdict.pop("chose_a") <= 1
    assert verdict == {"judge_model": "judge", "against": "reference", "samples": 6, "unparsed": 0}


def test_a_perfect_judge_and_what_it_is_asked(tmp_path, serve, capsys):
    server = serve(prefer("good", "mediocre", "bad"))
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad", quality="bad")
    assert run(good, server) == run(bad, server) == 0
    assert (result(good)["win_rate"], result(good)["win_rate_se"], result(good)["chose_a"]) == (1, 0, 0.5)
    assert (result(bad)["win_rate"], result(bad)["samples"]) == (0, 5)
    output = capsys.readouterr().out
    assert f"10 requests to judge at {server.url}/chat/completions: 2 for each of 5 samples;" in output
    assert "win rate against reference: 100.0 ± 0.0 % of 5 samples\n" in output
    headers, body = server.requests[0]
    assert "Authorization" not in headers
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 16)
    prompt = body["messages"][0]["content"]
    assert prompt.startswith("Below is a post, and two summaries of it.") and "Post:\npost 0\n\nSummary A:\n" in prompt
    assert options(prompt) == ("a good summary of 0", "a mediocre summary of 0 by a human being")
    assert options(server.requests[1][1]["messages"][0]["content"]) == options(prompt)[::-1]


def test_continuations_are_compared_by_sentiment_at_like_lengths(tmp_path, serve):
    server = serve(prefer("good", "mediocre"))
    run_dir = write_run(tmp_path / "run", script="sppo_rlhf_imdb")
    assert run(run_dir, server, "--max-tokens", "0") == 0
    prompt = server.requests[0][1]["messages"][0]["content"]
    assert "more positive" in prompt and "Continuation A:\na good summary of 0\n" in prompt
    assert options(prompt)[1] == "a mediocre summary of 0"
    assert server.requests[0][1].keys() == {"model", "messages"}  # judges that think take nothing else


def test_more_samples_ask_nothing_again_even_if_their_continuations_are_longer(tmp_path, serve):
    server = serve(prefer("good", "mediocre"))
    run_dir = write_run(tmp_path / "run", script="sppo_rlhf_imdb")
    path = run_dir / "eval_samples.jsonl"
    path.write_text(path.read_text().replace("a good summary of 4", "a good and long summary of 4"))
    assert run(run_dir, server, "--judge-samples", "2") == 0 and len(server.requests) == 4
    assert run(run_dir, server, "--judge-samples", "5") == 0 and len(server.requests) == 10


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
    assert len(server.requests) == 20


def test_both_orders_cancel_position_bias(tmp_path, serve):
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, serve(lambda *_: "A")) == 0
    verdict = result(run_dir)
    assert (verdict["win_rate"], verdict["win_rate_se"], verdict["chose_a"]) == (0.5, 0, 1)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" b\n", "B"),
        ("**B**", "B"),
        ("A. It is shorter than B.", "A"),
        ("B\nbecause A is long", "B"),
        ("The better one is summary A.", "A"),
        ("<think>A is fine.\nB is not.</think>\n\nAnswer: A", "A"),
        ("A better summary would be shorter", None),
        ("A or B", None),
        ("Both are bad", None),
        ("Summary B is better than Summary A.", None),
        ("I prefer summary B over summary A", None),
        ("Continuation B, not continuation A", None),
        ("Neither summary A", None),
        ("I wouldn't say summary A", None),
        ("I think the answer is B.", "B"),
        ("[THINK]Summary A\nis long.[/THINK]B", "B"),
        ("<thinking>Summary A</thinking>\nB.", "B"),
        ("<think>\nLet me look at Summary A", None),
        ("", None),
    ],
)
def test_answers(text, letter):
    assert judge.parse(text) == letter


def test_answers_without_a_letter_are_asked_for_again_and_then_ties(tmp_path, serve, capsys):
    wordy = serve(lambda prompt, number: "Both are fine" if number <= 6 else "A")
    run_dir = write_run(tmp_path / "run", num=2)
    assert run(run_dir, wordy) == 0
    assert (result(run_dir)["win_rate"], result(run_dir)["unparsed"], result(run_dir)["chose_a"]) == (0.375, 3, 1)
    assert len(wordy.requests) == 7
    messages = wordy.requests[1][1]["messages"]
    assert [m["content"] for m in messages[1:]] == ["Both are fine", judge.REMINDER]
    assert "3 answers were neither A nor B and count as ties" in capsys.readouterr().out
    second = serve(lambda prompt, number: "Hmm" if number % 2 else prefer("good", "mediocre")(prompt, 0))
    run_dir = write_run(tmp_path / "second", num=2)
    assert run(run_dir, second) == 0 and (result(run_dir)["win_rate"], result(run_dir)["unparsed"]) == (1, 0)


def test_an_empty_message_is_not_sent_back(tmp_path, serve):
    """Some servers refuse one, others two messages of one side in a row."""
    server = serve(lambda prompt, number: says(None, refusal="I cannot judge.") if number < 4 else "A")
    run_dir = write_run(tmp_path / "run", num=1)
    assert run(run_dir, server) == 0 and len(server.requests) == 4
    server = serve(lambda prompt, number: "<think>Hm.</think>" if number < 3 else "A")
    assert run(run_dir, server, model="thinks") == 0 and len(server.requests) == 3
    lengths = [len(body["messages"]) for _, body in server.requests]
    assert lengths == [1, 1, 1]


def test_no_win_rate_where_no_answer_is_usable(tmp_path, serve, capsys):
    run_dir = write_run(tmp_path / "run", num=2)
    assert run(run_dir, serve(lambda *_: says(None, "content_filter", refusal="I cannot\njudge."))) == 2
    error = capsys.readouterr().err
    assert "none of 4 answers was A or B, the last one: I cannot judge.; to ask again, move" in error
    assert not (run_dir / "judge.json").exists() and len(judgments(run_dir)) == 4


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Summary A is long."}]}


@pytest.mark.parametrize(
    "reply",
    [
        says([{"type": "text", "text": "B"}]),
        says([THINKING, {"type": "text", "text": "B"}]),
        says([{"type": "reasoning", "text": "Summary A"}, {"type": "output_text", "text": "B."}]),
        says([{"type": "text", "text": "The better one is "}, {"type": "text", "text": "summary B."}]),
        says(["B"]),
        says("B", "length", reasoning_content="Summary A is long."),
        says("B", refusal=None, tool_calls=[]),
    ],
)
def test_forms_of_an_answer(tmp_path, serve, reply):
    server = serve(lambda *_: reply)
    run_dir = write_run(tmp_path / "run", num=1)
    assert run(run_dir, server) == 0 and len(server.requests) == 2
    assert [judgment["answer"] for judgment in judgments(run_dir)] == ["B", "B"]


@pytest.mark.parametrize(
    "reply",
    [
        (200, {}, '{"choices": [{"message": {"role": "assistant"}, "finish_reason": "tool_calls"}]}'),
        says(None, refusal="I'm sorry, but I cannot."),
        says([]),
        says([{"type": "refusal", "refusal": "I'm sorry, but I cannot."}]),
        says([THINKING]),
    ],
)
def test_a_judge_that_declines_makes_a_tie(tmp_path, serve, reply):
    server = serve(lambda prompt, number: reply if number < 3 else "A")
    run_dir = write_run(tmp_path / "run", num=1)
    assert run(run_dir, server) == 0 and len(server.requests) == 3
    assert [judgment["answer"] for judgment in judgments(run_dir)] == [None, "A"]
    assert judgments(run_dir)[0]["text"] == ("I'm sorry, but I cannot." if "sorry" in reply[2] else "")


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (says(None, "length", reasoning_content="Okay, let me"), "nothing but thoughts"),
        (says("<think>\nOkay, let me look at Summary A", "length"), "<think> Okay, let me look at Summary A"),
        (says("Okay, let me look at Summary A", "length"), "Okay, let me look at Summary A"),
    ],
)
def test_an_answer_that_was_cut_off_is_none(tmp_path, serve, capsys, reply, words):
    server = serve(lambda *_: reply)
    run_dir = write_run(tmp_path / "run", num=1)
    assert run(run_dir, server) == 2
    error = capsys.readouterr().err
    assert f"cut off at --max-tokens 16 before it had come to A or B ({words}): 0 leaves" in error
    assert error.count("\n") == 1 and not judgments(run_dir)
    server = serve(lambda prompt, number: reply if number < 3 else "A")  # of the endpoint's own length
    assert run(run_dir, server, "--max-tokens", "0") == 0 and result(run_dir)["unparsed"] == 1


def test_failures_that_pass_are_waited_out(tmp_path, serve):
    failures = [(429, {}, "slow down"), (503, {}, ""), (500, {}, "{}"), (429, {"Retry-After": "20"}, "[]")]
    failures += [None, (200, {}, '{"error": "busy"}'), (200, {}, "<html>")]  # no answers, but there was one before
    failures += [None, refuses({"message": "Provider returned error", "code": 502}), (200, {}, '{"choices": []}')]

    def answer(prompt, number):
        failure = failures[number - 1] if number <= len(failures) else None
        return failure or prefer("good", "mediocre")(prompt, number)

    server = serve(answer)
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, server) == 0 and result(run_dir)["win_rate"] == 1
    assert len(server.requests) == 18 and server.waits == [1, 2, 4, 20, 1, 2, 1, 2]


def test_a_wait_may_be_given_as_a_date_or_a_fraction(tmp_path, serve, capsys):
    soon = formatdate(time.time() + 100, usegmt=True)
    waits = ["1.5", soon, "Wed, 21 Oct 2015 07:28:00 GMT", "soon"]
    server = serve(lambda prompt, n: (503, {"Retry-After": waits[n - 1]}, "") if n <= len(waits) else "A")
    run_dir = write_run(tmp_path / "run", num=1)
    assert run(run_dir, server) == 0
    assert server.waits == [1.5, pytest.approx(100, abs=30), 4, 8]


def test_who_asks_for_a_day_is_not_waited_for(tmp_path, serve, capsys):
    error = {"message": "Daily limit reached", "code": "rate_limit_exceeded"}
    server = serve(lambda prompt, number: refuses(error, 429, Retry_After="86400") if number > 1 else "A")
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, server) == 1 and server.waits == [] and len(judgments(run_dir)) == 1
    error = capsys.readouterr().err
    assert "asks to wait 86400 seconds: HTTP 429 Too Many Requests: Daily limit reached; the judg" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            refuses({"message": "Rate limit exceeded: free-models-per-day", "code": 429}),
            "Rate limit exceeded: free-mod",
        ),
        (
            refuses({"message": "Provider\nreturned", "code": "502", "metadata": {"raw": "GPU lost"}}),
            '{"raw": "GPU lost"}',
        ),
        ((200, {}, '{"choices": [{"error": {"code": 502, "message": "GPU lost"}, "message": {}}]}'), "GPU lost"),
        (
            (502, {}, "<html><style>p {}</style><title>Bad gateway</title>\n<h1>nginx &amp; co</h1>"),
            "Bad gateway nginx & co",
        ),
        ((503, {}, '{"error": {"message": "Loading model", "type": "unavailable_error"}}'), "Loading model"),
        ((500, {}, '[{"error": {"code": 500, "message": "Internal", "status": "INTERNAL"}}]'), "Error: Internal;"),
    ],
)
def test_the_servers_own_words_after_failures_that_may_pass(tmp_path, serve, capsys, reply, words):
    server = serve(lambda *_: reply)
    assert run(write_run(tmp_path / "run"), server, "--retries", "2") == 1
    error = capsys.readouterr().err
    assert "failed 3 times, at last with HTTP" in error and words in error and error.count("\n") == 1, error
    assert "<" not in error and len(server.requests) == 3


def test_the_servers_own_words_where_no_answer_comes_any_more(tmp_path, serve, capsys):
    for model, body, words in (
        ("one", '{"error": "Model unloaded."}', "HTTP 200 OK: Model unloaded.;"),
        ("two", '{"choices": []}', 'HTTP 200 OK: {"choices": []};'),
        ("three", "", "HTTP 200 OK: nothing;"),
    ):
        server = serve(lambda prompt, number, body=body: "A" if number == 1 else (200, {}, body))
        assert run(write_run(tmp_path / model), server, "--retries", "1", model=model) == 1
        error = capsys.readouterr().err
        assert f"failed 2 times, at last with {words}" in error, error


def test_a_disk_that_takes_nothing_is_one_line_with_the_file(tmp_path, serve, capsys):
    run_dir = write_run(tmp_path / "run", num=1)
    path = run_dir / "judgments-judge-reference.jsonl"
    path.symlink_to("/dev/full")  # reads as a file of zeros without an end
    server = serve(lambda *_: "A")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "read_judgments", lambda _: {})
        assert run(run_dir, server) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} cannot be written: No space left on device") and error.count("\n") == 1
    path.unlink()
    (run_dir / "judge.json.tmp").symlink_to("/dev/full")
    assert run(run_dir, server) == 1
    assert f"{run_dir / 'judge.json'} cannot be written: No space left on device" in capsys.readouterr().err


def test_a_server_that_keeps_failing_loses_nothing(tmp_path, serve, capsys):
    failing = serve(lambda prompt, number: (500, {}, '{"error": "overloaded"}') if number > 3 else "A")
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, failing, "--retries", "8") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "failed 9 times, at last with HTTP 500" in error and "overloaded" in error
    assert failing.waits == [1, 2, 4, 8, 16, 32, 60, 60] and not (run_dir / "judge.json").exists()
    server = serve(lambda *_: "A")
    assert run(run_dir, server) == 0 and len(server.requests) == 7 and result(run_dir)["win_rate"] == 0.5


def test_a_slow_answer_is_asked_for_again(tmp_path, serve):
    done = threading.Event()

    def answer(prompt, number):
        if number == 1:
            done.wait(60)
        return "B"

    server = serve(answer)
    run_dir = write_run(tmp_path / "run", num=1)
    assert run(run_dir, server, "--timeout", "2") == 0 and len(server.requests) == 3 and server.waits == [1]
    done.set()
    assert (result(run_dir)["samples"], result(run_dir)["win_rate_se"]) == (1, None)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {}, json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}})), "Incorrect API key: ***"),
        ((404, {}, json.dumps({"error": {"message": "The model judge does not exist"}})), "judge does not exist"),
        ((400, {}, "not\nJSON"), "HTTP 400 Bad Request: not JSON"),
        ((200, {}, "<html>Welcome</html>"), "answer as a chat-completions endpoint does: HTTP 200 OK: Welcome\n"),
        ((200, {}, '{"choices": []}'), 'answer as a chat-completions endpoint does: HTTP 200 OK: {"choices": []}\n'),
        ((200, {}, '{"choices": null, "detail": "Not here"}'), "Not here"),
        ((200, {}, '["A"]'), 'chat-completions endpoint does: HTTP 200 OK: ["A"]'),
        ((200, {}, ""), "chat-completions endpoint does: HTTP 200 OK: nothing"),
        ((200, {}, 'data: {"choices": []}\n\ndata: [DONE]\n'), 'HTTP 200 OK: data: {"choices": []} data: [DONE]\n'),
        (says(5), "does not answer as a chat-completions endpoint does: HTTP 200 OK: {"),
        (refuses("Unexpected endpoint (POST /chat)"), "endpoint does: HTTP 200 OK: Unexpected endpoint (POST /chat)\n"),
        (refuses({"message": "No such model", "code": 404}), "completions: HTTP 200 OK: No such model\n"),
        (refuses({"message": "No credits", "code": 402}), "completions: HTTP 200 OK: No credits\n"),
        (refuses({"message": f"No key {KEY}", "code": 401}), "OK: No key *** (OPENAI_API_KEY is set)"),
        (refuses({"message": None}, 400), 'HTTP 400 Bad Request: {"error": {"message": null}}'),
        ((400, {}, '{"detail": [{"loc": ["body"], "msg": "no\\u001b field"}]}'), '"msg": "no\\u001b field"}'),
        (refuses("beep \x1b[31m\x07", 400), "HTTP 400 Bad Request: beep [31m\n"),
        (refuses("x" * 290 + KEY, 400), "x" * 278 + "\n"),  # a key that is cut
        (refuses({"message": "Unsupported parameter: 'max_tokens'"}, 400), "(--max-tokens 0 sends neither max_tokens"),
        ((307, {"Location": "http://127.0.0.1:9/"}, ""), "HTTP 307"),
    ],
)
def test_errors_of_the_endpoint_are_one_line(tmp_path, serve, capsys, monkeypatch, reply, message):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda *_: reply)
    assert run(write_run(tmp_path / "run"), server) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert len(server.requests) == 1 and KEY[:6] not in error


def test_errors_of_the_input_are_one_line(tmp_path, serve, capsys, monkeypatch):
    server = serve(lambda *_: "A")
    run_dir, control = write_run(tmp_path / "run"), write_run(tmp_path / "control", script="sppo_atari")
    broken = write_run(tmp_path / "broken")
    (broken / "eval_samples.jsonl").write_text('{"index": 0}\n')
    (tmp_path / "empty").mkdir()
    for args, message in (
        ([tmp_path / "empty", "--judge-url", server.url], "there is no"),
        ([control, "--judge-url", server.url], "sppo_atari.py, which is no language script"),
        ([broken, "--judge-url", server.url], "cannot be read"),
        ([run_dir, "--judge-url", server.url, "--against", tmp_path / "nowhere"], "there is no"),
        ([run_dir, "--judge-url", "localhost:8000"], "is no http or https address"),
        ([run_dir, "--judge-url", "http://127.0.0.1:9/v1"], "cannot be reached (ConnectionRefusedError"),
        ([run_dir, "--judge-url", "http://127.0.0.1:port/v1"], "cannot be reached (InvalidURL: nonnumeric port"),
        ([run_dir, "--judge-url", "http://[::1/v1"], "cannot be reached (ValueError: Invalid IPv6 URL)"),
        ([run_dir, "--judge-url", server.url, "--judge-samples", "0"], "--judge-samples must be above 0"),
    ):
        assert judge.main([*map(str, args), "--judge-model", "judge"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nand more")
    assert run(run_dir, server) == 2 and KEY not in capsys.readouterr().err
    assert not server.requests


def test_the_key_goes_to_the_endpoint_and_nowhere_else(tmp_path, serve, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    elsewhere = serve(lambda *_: "A")
    location = {"Location": f"{elsewhere.url}/chat/completions"}
    server = serve(lambda prompt, number: (302, location, "") if number > 10 else f"A. I was told {KEY}")
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, server) == 0
    assert {headers["Authorization"] for headers, _ in server.requests} == {f"Bearer {KEY}"}
    assert run(run_dir, server, model="other") == 2
    assert elsewhere.requests and all("Authorization" not in headers for headers, _ in elsewhere.requests)
    assert all(KEY not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    output = capsys.readouterr()
    assert KEY not in output.out + output.err


def test_a_dry_run_asks_nothing_and_samples_bound_the_costs(tmp_path, serve, capsys):
    server = serve(lambda *_: "A")
    run_dir = write_run(tmp_path / "run", num=150)
    assert run(run_dir, server, "--dry-run") == 0
    assert "200 requests" in capsys.readouterr().out and not server.requests
    assert run(run_dir, server, "--judge-samples", "2") == 0 and len(server.requests) == 4
    assert run(run_dir, server, "--judge-samples", "3") == 0 and len(server.requests) == 6
    assert "2 requests to judge" in capsys.readouterr().out and result(run_dir)["samples"] == 3
    assert run(run_dir, server, "--judge-samples", "3") == 0 and len(server.requests) == 6
    assert run(run_dir, server, "--judge-samples", "3", model="other/judge") == 0 and len(server.requests) == 12
    assert (run_dir / "judgments-other-judge-reference.jsonl").exists()


def test_changed_responses_are_judged_anew(tmp_path, serve):
    server = serve(prefer("good", "mediocre", "bad"))
    run_dir = write_run(tmp_path / "run")
    assert run(run_dir, server) == 0
    path = run_dir / "eval_samples.jsonl"
    path.write_text(path.read_text().replace("good summary of 3", "bad summary of 3"))
    assert run(run_dir, server) == 0
    assert len(server.requests) == 12 and result(run_dir)["win_rate"] == pytest.approx(0.8)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_judge_goes_on_where_it_was(tmp_path, serve, number):
    go = threading.Event()

    def answer(prompt, request):
        if request == 4:
            go.wait(30)
        return "A"

    server = serve(answer)
    run_dir = write_run(tmp_path / "run")
    command = [sys.executable, str(ROOT / "benchmark" / "judge.py"), str(run_dir)]
    command += ["--judge-url", f"{server.url}/chat/completions/", "--judge-model", "judge"]
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    # A shell starts what it runs in the background with SIGINT ignored, which children inherit.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while len(server.requests) < 4:
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    go.set()
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), error
    assert number == signal.SIGKILL or error == "\nstopped; the same command goes on\n"
    path = run_dir / "judgments-judge-reference.jsonl"
    assert len(judgments(run_dir)) == 3
    path.write_text(path.read_text() + '{"id": "cut sh')  # as a kill in the middle of a write leaves it
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 requests") and "3 judged before" in done.stdout
    assert len(server.requests) == 4 + 7 and len(judgments(run_dir)) == 10
    assert result(run_dir)["win_rate"] == 0.5
