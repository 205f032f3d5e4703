"""API keys and their limits through a real gateway: made, used, limited, revoked, and never shown again.

Run by ctest; alone: tests/cluster/with_client.sh tests/cluster/keys_test.py
"""
import json
import os
import subprocess
import threading
import time
import unittest

import openai

from cluster import BIN, Cluster, get, post

MODEL = "cinnabar-tiny"
BODY = {"model": MODEL, "prompt": "def f(x):\n    return x", "max_tokens": 4, "seed": 1}


class KeysTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(device="null", null_step_us=200)
        pepper = os.path.join(cls.cluster.folder, "pepper")
        cls.pepper = pepper
        gateway = cls.cluster.gateways[0]
        gateway.args += ["--keys-pepper", pepper, "--price-input", "1000", "--price-output", "1000"]
        cls.cluster.redis.start()
        cls.cluster.wait_redis()
        cls.first = cls.create("first")  # makes the pepper, which the gateway wants at its start
        for process in [*cls.cluster.schedulers, *cls.cluster.workers, *cls.cluster.gateways]:
            process.start()
        cls.cluster.wait_ready()
        cls.port = cls.cluster.gateway_ports[0]

    @classmethod
    def tearDownClass(cls):
        cls.cluster.stop()

    @classmethod
    def keys(cls, *args, status=0):
        done = subprocess.run([os.path.join(BIN, "cinnabar"), "keys", *args, "--redis", cls.cluster.redis_address],
                              capture_output=True, text=True, timeout=60)
        if done.returncode != status:
            raise AssertionError(f"keys {args}: {done.returncode}: {done.stderr}")
        return done.stdout if status == 0 else done.stderr

    @classmethod
    def create(cls, tenant, *flags):
        return json.loads(cls.keys("create", "--pepper", cls.pepper, "--tenant", tenant, "--json", *flags))

    def ask(self, key, body=None, headers=None):
        headers = dict(headers or {})
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        return post(self.port, "/v1/completions", body or BODY, headers)

    def wait_for_key(self, key):
        end = time.monotonic() + 10
        while self.ask(key)[0] == 401 and time.monotonic() < end:
            time.sleep(0.1)

    def test_a_key_is_asked_for(self):
        for key in (None, "", "sk-123", self.first["key"][:-1], self.first["key"] + "x"):
            status, reply, headers = self.ask(key)
            self.assertEqual(status, 401, reply)
            self.assertEqual(reply["error"]["code"], "invalid_api_key")
            self.assertNotIn(self.first["key"][30:50], json.dumps(reply))
        self.assertEqual(self.ask(self.first["key"])[0], 200)
        client = openai.OpenAI(base_url=self.cluster.url + "/v1", api_key=self.first["key"])
        self.assertIn(MODEL, [model.id for model in client.models.list()])
        wrong = openai.OpenAI(base_url=self.cluster.url + "/v1", api_key="nonsense", max_retries=0)
        with self.assertRaises(openai.AuthenticationError):
            wrong.models.list()
        self.assertEqual(get(self.port, "/healthz")[0], 200)

    def test_a_revoked_key_ends_within_seconds(self):
        made = self.create("leaver")
        self.wait_for_key(made["key"])
        self.assertEqual(self.ask(made["key"])[0], 200)
        self.assertIn("revoked since", self.keys("revoke", made["id"]))
        begin = time.monotonic()
        while self.ask(made["key"])[0] == 200:
            self.assertLess(time.monotonic() - begin, 8)
            time.sleep(0.05)
        self.assertEqual(self.ask(made["key"])[0], 401)
        listed = {key["id"]: key for key in json.loads(self.keys("list", "--json"))}
        self.assertIsNotNone(listed[made["id"]]["revoked"])
        self.assertNotIn("key", listed[made["id"]])
        self.assertIn("is forgotten", self.keys("forget", made["id"]))

    def test_requests_a_minute(self):
        key = self.create("few", "--requests-per-minute", "20")["key"]
        end = time.monotonic() + 10
        statuses, last = [], None
        while len([s for s in statuses if s == 200]) < 30 and time.monotonic() < end:
            status, reply, headers = self.ask(key)
            if status == 401:
                time.sleep(0.05)
                continue
            statuses.append(status)
            if status == 429:
                last = (reply, {name.lower(): value for name, value in headers.items()})
                break
            self.assertEqual(status, 200, reply)
            lower = {name.lower(): value for name, value in headers.items()}
            self.assertEqual(lower["x-ratelimit-limit-requests"], "20")
            self.assertGreaterEqual(int(lower["x-ratelimit-remaining-requests"]), 0)
        self.assertIsNotNone(last, statuses)
        self.assertGreaterEqual(len([s for s in statuses if s == 200]), 20)
        reply, headers = last
        self.assertEqual(reply["error"]["code"], "rate_limit_exceeded")
        self.assertIn("requests", reply["error"]["message"])
        wait = float(headers["retry-after"])
        self.assertLessEqual(wait, 4)
        self.assertEqual(headers["x-ratelimit-limit-requests"], "20")
        self.assertEqual(headers["x-ratelimit-remaining-requests"], "0")
        self.assertRegex(headers["x-ratelimit-reset-requests"], r"^\d")
        time.sleep(wait)
        self.assertEqual(self.ask(key)[0], 200)  # it was honest
        # Another tenant is not concerned.
        self.assertEqual(self.ask(self.first["key"])[0], 200)

    def test_tokens_and_token_steps_a_minute(self):
        key = self.create("small", "--tokens-per-minute", "40")["key"]
        self.wait_for_key(key)
        statuses = [self.ask(key)[0] for _ in range(8)]
        self.assertIn(429, statuses)
        key = self.create("costly", "--token-steps-per-minute", "100")["key"]
        self.wait_for_key(key)
        statuses = [self.ask(key)[0] for _ in range(8)]
        self.assertIn(429, statuses)

    def test_a_spent_budget_is_no_rate_limit(self):
        key = self.create("thrifty", "--budget-dollars-per-month", "0.1")["key"]  # a tenth of a cent a token
        self.wait_for_key(key)
        end = time.monotonic() + 30
        paid, status = 0.0, 200
        while status == 200 and time.monotonic() < end:
            status, reply, headers = self.ask(key)
            if status == 200:
                paid += reply["usage"]["diffusion"]["price_dollars"]
        self.assertEqual(status, 429, reply)
        self.assertEqual(reply["error"]["code"], "insufficient_quota")
        self.assertIn("budget", reply["error"]["message"])
        self.assertNotIn("retry-after", {name.lower() for name in headers})  # waiting does not help
        self.assertGreater(paid, 0)
        self.assertLessEqual(paid, 0.1)

    def test_concurrency(self):
        key = self.create("narrow", "--concurrency", "2")["key"]
        self.wait_for_key(key)
        long_body = {**BODY, "max_tokens": 128, "diffusion": {"steps": 128}}
        results = []
        threads = [threading.Thread(target=lambda: results.append(self.ask(key, long_body)[:2])) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(status for status, _ in results)
        self.assertIn(200, codes)
        self.assertIn(429, codes)
        self.assertEqual(set(codes), {200, 429}, results)

    def test_a_key_for_other_models(self):
        key = self.create("other", "--model", "another-model")["key"]
        self.wait_for_key(key)
        status, reply, _ = self.ask(key)
        self.assertIn(status, (403, 404), reply)

    def test_class_ceiling(self):
        key = self.create("lowly", "--class-max", "batch")["key"]
        self.wait_for_key(key)
        self.assertEqual(self.ask(key, {**BODY, "priority": "interactive"})[0], 200)
        self.assertIn('class="batch"', get(self.port, "/metrics")[1].decode())

    def test_errors_name_the_fix(self):
        self.assertIn("--pepper is missing", self.keys("create", "--tenant", "x", status=2))
        self.assertIn("tenant", self.keys("create", "--pepper", self.pepper, "--tenant", "a b", status=2))
        self.assertIn("keys list", self.keys("revoke", "nobody", status=1))
        self.assertIn("takes one key's id", self.keys("revoke", status=2))
        self.assertIn("no-such", self.keys("create", "--no-such", status=2))

    def test_zz_no_secret_in_any_log_or_in_redis(self):
        secret = self.first["key"].rsplit("_", 1)[1]
        for folder, _, names in os.walk(self.cluster.folder):  # logs, and all that Redis wrote
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    self.assertNotIn(secret[:16].encode(), file.read(), name)
        for process in self.cluster.processes():
            self.assertNotIn(secret[:16], process.log(), process.name)
        metrics = get(self.port, "/metrics")[1].decode()
        self.assertNotIn(secret[:16], metrics)
        self.assertIn('cinnabar_auth_failures_total{reason="malformed"}', metrics)
        self.assertIn('cinnabar_api_keys{state="live"}', metrics)


if __name__ == "__main__":
    unittest.main(verbosity=2)
