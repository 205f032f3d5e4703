#!/usr/bin/env python3
"""`generate --url` and `bench load` against a gateway that is made to misbehave.

    usage: gateway_client_test.py BINARY
"""
import json
import os
import pathlib
import pty
import re
import resource
import select
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fake_gateway import FakeGateway  # noqa: E402

BINARY = pathlib.Path(sys.argv[1]).resolve()


def run(*args, code=0, timeout=120):
    done = subprocess.run([BINARY, *map(str, args)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    return done


def run_on_terminal(*args):
    """Output of a command whose three streams are one terminal, and its exit status."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="80")
        os.environ.pop("NO_COLOR", None)
        os.execv(BINARY, [str(BINARY), *map(str, args)])
    out = b""
    while True:
        try:
            data = os.read(fd, 65536)
        except OSError:
            break
        if not data:
            break
        out += data
    return out.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Server(unittest.TestCase):
    def start(self, behave=None, **more):
        server = FakeGateway(behave, **more)
        self.addCleanup(server.close)
        return server


class Generate(Server):
    def test_text_streams_and_asks_for_the_right_thing(self):
        server = self.start(lambda body: {"words": ["a", "b", "é\n"]})
        out = run("generate", "--url", server.url, "--prompt", "x", "--gen-length", 3, "--threshold", 0.5, "--seed", 7,
                  "--stop", "END", "--stop", ";")
        self.assertEqual(out.stdout, "abé\n\n")
        path, headers, body = server.requests[0]
        self.assertEqual(path, "/v1/completions")
        self.assertEqual(body["model"], "fake-model")
        self.assertEqual((body["prompt"], body["max_tokens"], body["seed"]), ("x", 3, 7))
        self.assertEqual(body["stop"], ["END", ";"])
        self.assertEqual(body["diffusion"], {"threshold": 0.5})
        self.assertNotIn("authorization", headers)
        run("generate", "--url", server.url + "/v1", "--prompt", "x", "--suffix", "y", "--model", "m", "--steps", 2)
        self.assertEqual(server.requests[1][0], "/v1/fim/completions")
        self.assertEqual((server.requests[1][2]["suffix"], server.requests[1][2]["model"]), ("y", "m"))
        run("generate", "--url", server.url, "--chat", "hello")
        self.assertEqual(server.requests[2][0], "/v1/chat/completions")
        self.assertEqual(server.requests[2][2]["messages"], [{"role": "user", "content": "hello"}])

    def test_json_is_the_reply(self):
        server = self.start()
        out = json.loads(run("generate", "--url", server.url, "--prompt", "x", "--json").stdout)
        self.assertEqual(out["usage"]["completion_tokens"], 4)
        self.assertNotIn("stream", server.requests[0][2])

    def test_keys_come_from_a_file(self):
        server = self.start()
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("# mine\n\n  secret-1 \n")
            file.flush()
            run("generate", "--url", server.url, "--prompt", "x", "--api-key-file", file.name)
        self.assertEqual(server.requests[0][1]["authorization"], "Bearer secret-1")

    def test_watch_shows_tokens_where_they_were_decided(self):
        server = self.start(lambda body: {"words": ["one ", "two ", "three"], "step_delay": 0.02})
        out, code = run_on_terminal("generate", "--url", server.url, "--prompt", "P:", "--watch")
        self.assertEqual(code, 0)
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
        self.assertIn("P:░░three", plain)   # the fake decides the last first
        self.assertIn("P:one two three", plain)
        self.assertIn("2.00 tokens per forward", plain)
        self.assertIn("\x1b[?25l", out)
        self.assertTrue(out.rstrip().endswith("\x1b[?25h"), repr(out[-50:]))
        # Without a terminal it is the text alone.
        self.assertEqual(run("generate", "--url", server.url, "--prompt", "P:", "--watch").stdout, "one two three\n")

    def test_errors_say_what_to_do(self):
        error = {"message": "take at least 1", "param": "max_tokens", "code": "invalid_value"}
        cases = [({"status": 400, "error": error}, 2, "max_tokens: take at least 1"),
                 ({"status": 401, "error": {"message": "no key"}}, 1, "--api-key-file"),
                 ({"status": 429, "error": {"message": "slow down"}, "headers": {"Retry-After": "4"}}, 1,
                  "try again in 4 s"),
                 ({"status": 500, "error": {"message": "oops"}}, 1, "req-1"),
                 ({"raw": b"SSH-2.0-OpenSSH\r\n\r\n"}, 1, "does not speak HTTP"),
                 ({"raw": b""}, 1, "broke off"),
                 ({"cut": 2}, 1, "broke off"),
                 ({"break_at": 1}, 1, "it broke")]
        for how, code, words in cases:
            with self.subTest(words=words, how=how):
                server = self.start(lambda body, how=how: how)
                out = run("generate", "--url", server.url, "--prompt", "x", code=code)
                self.assertIn(words, out.stderr)
        nobody = run("generate", "--url", "http://127.0.0.1:1", "--prompt", "x", code=1).stderr
        self.assertIn("cinnabar up", nobody)
        for args, words in [(["--url", "nonsense://x", "--prompt", "x"], "http://127.0.0.1:8080"),
                            (["--url", "localhost:1"], "--prompt, --chat"),
                            (["--url", "localhost:1", "--prompt", "x", "--chat", "y"], "exclude each other"),
                            (["--url", "localhost:1", "--prompt", "x", "--threads", "2"], "--threads"),
                            (["--prompt", "x", "--stop", "y"], "--url")]:
            with self.subTest(args=args):
                self.assertIn(words, run("generate", *args, code=2).stderr)
        self.assertIn("cannot read", run("generate", "--url", "localhost:1", "--prompt", "x", "--api-key-file",
                                         "/nowhere", code=1).stderr)

    def test_ctrl_c_closes_the_connection_and_shows_the_cursor(self):
        server = self.start(lambda body: {"words": ["a"] * 200, "step_delay": 0.05})
        pid, fd = pty.fork()
        if pid == 0:
            os.execv(BINARY, [str(BINARY), "generate", "--url", server.url, "--prompt", "x", "--watch"])
        out = b""
        while b"step 3" not in out:
            out += os.read(fd, 65536)
        os.kill(pid, signal.SIGINT)
        try:
            while data := os.read(fd, 65536):
                out += data
        except OSError:
            pass
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -signal.SIGINT)
        self.assertTrue(out.endswith(b"\x1b[?25h"), out[-40:])
        deadline = time.time() + 5
        while server.open_now and time.time() < deadline:
            time.sleep(0.02)
        self.assertEqual(server.open_now, 0)

    def test_https_checks_the_certificate(self):
        with tempfile.TemporaryDirectory() as folder:
            cert, key = f"{folder}/cert.pem", f"{folder}/key.pem"
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                            "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=127.0.0.1",
                            "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key)
            server = self.start(ssl=context)
            self.assertIn("no TLS", run("generate", "--url", server.url, "--prompt", "x", code=1).stderr)
            out = run("generate", "--url", server.url, "--prompt", "x", "--ca-file", cert)
            self.assertEqual(out.stdout, "w0 w1 w2 w3 \n")


class BenchLoad(Server):
    def load(self, server, *args, code=0):
        out = run("bench", "load", "--url", server.url, "--json", "--drain", 5, *args, code=code)
        return json.loads(out.stdout)

    def test_counts_and_tokens(self):
        server = self.start()
        report = self.load(server, "--rate", 200, "--uniform", "--seconds", 1, "--canvas-tokens", 8)
        self.assertEqual((report["requests"], report["ok"], report["failed"]), (200, 200, 0))
        self.assertEqual(report["completion_tokens"], 1600)
        self.assertEqual(report["prompt_tokens"], 2200)
        self.assertEqual(report["tokens_per_forward"], 2.0)
        self.assertLess(report["connections"], 100)  # kept, not one for each request
        self.assertEqual(len(server.requests), 200)
        self.assertEqual({body["max_tokens"] for _, _, body in server.requests}, {8})

    def test_a_stall_shows_in_the_latencies(self):
        """Coordinated omission: a second of silence must cost those that were due in it."""
        seen = []

        def behave(body):
            seen.append(body)
            if len(seen) == 50:
                server.stall(1.0)
            return {}
        server = self.start(behave)
        report = self.load(server, "--rate", 100, "--uniform", "--seconds", 3)
        self.assertEqual(report["ok"], 300)
        latency = report["latency_seconds"]
        # A third of all were due in the silent second; they waited half of it on average.
        self.assertGreater(latency["p90"], 0.5)
        self.assertGreater(latency["max"], 0.9)
        self.assertLess(latency["p50"], 0.2)
        self.assertGreater(latency["mean"], 0.1)

    def test_waiting_in_the_client_counts_too(self):
        server = self.start(lambda body: {"delay": 0.1})
        report = self.load(server, "--rate", 50, "--uniform", "--seconds", 1, "--in-flight-max", 1)
        self.assertEqual(report["in_flight_peak"], 1)
        self.assertGreater(report["held_back"], 30)
        # 50 requests of 0.1 s one after the other: the last one waits four seconds.
        self.assertGreater(report["latency_seconds"]["max"], 3.0)

    def test_streams_first_partial_and_goodput(self):
        server = self.start(lambda body: {"delay": 0.05 if body["seed"] % 2 else 0.4, "steps": 4, "step_delay": 0.02})
        report = self.load(server, "--rate", 100, "--uniform", "--seconds", 1, "--stream", "--deadline", 0.3,
                           "--body", '{"diffusion": {"frames": true}}')
        self.assertEqual(report["ok"], 100)
        self.assertEqual(report["in_deadline"], 50)
        self.assertAlmostEqual(report["goodput_share"], 0.5)
        self.assertLess(report["first_partial_seconds"]["p50"] + 0.03, report["latency_seconds"]["p50"])
        body = server.requests[0][2]
        self.assertTrue(body["stream"] and body["stream_options"]["include_usage"])
        self.assertAlmostEqual(body["diffusion"]["deadline_seconds"], 0.3, 5)

    def test_errors_by_code(self):
        kinds = [{"status": 429, "error": {"code": "rate_limit_exceeded"}}, {"status": 503, "error": {}},
                 {"raw": b"junk\r\n\r\n"}, {"cut": 1}, {"break_at": 1}, {"delay": 9}, {}]
        server = self.start(lambda body: kinds[body["seed"] % len(kinds)])
        report = self.load(server, "--rate", 70, "--uniform", "--seconds", 1, "--stream", "--timeout", 1)
        self.assertEqual(report["errors"], {"429 rate_limit_exceeded": 10, "503": 10, "connect": 10, "broken": 10,
                                            "stream request_failed": 10, "timeout": 10})
        self.assertEqual(report["ok"], 10)

    def test_unfinished_ones_are_counted(self):
        server = self.start(lambda body: {"delay": 30} if body["seed"] % 2 else {})
        out = run("bench", "load", "--url", server.url, "--json", "--rate", 20, "--uniform", "--seconds", 1,
                  "--drain", 0.5)
        self.assertEqual(json.loads(out.stdout)["errors"], {"unfinished": 10})

    def test_nothing_answered_is_a_failure(self):
        server = self.start(lambda body: {"status": 500})
        report = self.load(server, "--rate", 20, "--seconds", 1, code=1)
        self.assertEqual(report["ok"], 0)
        out = run("bench", "load", "--url", "127.0.0.1:1", "--rate", 10, code=1)
        self.assertIn("cinnabar up", out.stderr)

    def test_warmup_is_not_counted(self):
        server = self.start()
        report = self.load(server, "--rate", 50, "--uniform", "--seconds", 1, "--warmup", 1)
        self.assertEqual(report["requests"], 50)
        self.assertEqual(len(server.requests), 100)

    def test_closed_loop_keeps_its_number(self):
        server = self.start(lambda body: {"delay": 0.05})
        report = self.load(server, "--concurrency", 10, "--seconds", 1)
        self.assertEqual(server.open_peak, 10)
        self.assertGreater(report["ok"], 100)
        self.assertLess(report["ok"], 260)

    def test_a_kept_connection_that_was_closed_is_replaced(self):
        server = self.start(lambda body: {"keep": False})  # closed without a word after each answer
        report = self.load(server, "--rate", 40, "--uniform", "--seconds", 1)
        self.assertEqual(report["ok"], 40)

    def test_trace_gives_arrivals_lengths_and_tenants(self):
        server = self.start()
        with tempfile.TemporaryDirectory() as folder:
            trace, keys = pathlib.Path(folder, "t.csv"), pathlib.Path(folder, "keys")
            trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0,5,10\n"
                             "2023-11-16 18:17:05.0,2000,70\n")
            keys.write_text("k1\nk2\n")
            report = self.load(server, "--trace", trace, "--time-scale", 10, "--prompt-tokens", 50, "--api-key-file",
                               keys, "--priority", "mix")
        self.assertEqual(report["ok"], 2)
        first, second = (request[2] for request in server.requests)
        self.assertEqual((first["max_tokens"], second["max_tokens"]), (32, 128))
        self.assertEqual((len(first["prompt"].split()), len(second["prompt"].split())), (5, 50))
        self.assertEqual(second["diffusion"]["steps"], 64)
        self.assertIn(first["priority"], ("interactive", "standard", "batch"))
        self.assertEqual([request[1]["authorization"] for request in server.requests], ["Bearer k1", "Bearer k2"])

    def test_two_thousand_streams_at_once(self):
        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 5000:
            self.skipTest("needs 5,000 file descriptors")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        server = self.start(lambda body: {"steps": 4, "step_delay": 2.0})
        process = subprocess.Popen([BINARY, "bench", "load", "--url", server.url, "--rate", "1000", "--seconds", "2",
                                    "--stream", "--drain", "60", "--json"], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        rss_kb = 0
        while process.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                rss_kb = max(rss_kb, int(re.search(r"VmRSS:\s+(\d+)", status).group(1)))
            except (OSError, AttributeError):
                pass
            time.sleep(0.2)
        report = json.loads(process.stdout.read())
        process.stdout.close()
        self.assertEqual(report["failed"], 0)
        self.assertGreater(report["in_flight_peak"], 1500)
        self.assertLess(rss_kb, 150_000)

    def test_errors_name_the_fix(self):
        url = ["--url", "localhost:1"]
        for args, words in [([], "cinnabar bench load"), (["loud"], "there is load"),
                            (["load"], "--url is missing"), (["load", *url], "--rate, --trace, --concurrency"),
                            (["load", *url, "--rate", 1, "--concurrency", 2], "exclude each other"),
                            (["load", *url, "--rate", 0], "more than 0"),
                            (["load", *url, "--rate", 1, "--time-scale", 2], "--trace"),
                            (["load", *url, "--rate", 1, "--priority", "vip"], "interactive"),
                            (["load", *url, "--rate", 1, "--endpoint", "x"], "fim"),
                            (["load", *url, "--rate", 1, "--body", "[1]"], "JSON object"),
                            (["load", *url, "--rate", 1, "--body", "{"], "--body"),
                            (["load", *url, "--trace", "/nowhere"], "/nowhere")]:
            with self.subTest(args=args):
                self.assertIn(words, run("bench", *args, code=2).stderr)
        self.assertIn("--time-scale", run("bench", "--help").stdout)

    def test_ctrl_c_still_reports(self):
        server = self.start()
        process = subprocess.Popen([BINARY, "bench", "load", "--url", server.url, "--rate", "50"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(server.requests) < 20:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=10)
        self.assertEqual(process.returncode, 0)
        self.assertIn("interrupted", out)
        self.assertIn("latency", out)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[2:]], verbosity=1)
