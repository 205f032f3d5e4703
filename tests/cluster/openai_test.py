"""The HTTP surface through the official `openai` Python client, against a real cluster.

Run by ctest; alone: tests/cluster/with_client.sh tests/cluster/openai_test.py
"""
import http.client
import json
import socket
import threading
import time
import unittest

import openai

from cluster import Cluster, get, post, stream

MODEL = "cinnabar-tiny"
PROMPT = 'def total_price(orders):\n    """Return the sum of price over all orders."""\n    return sum(order'
SUFFIX = " for order in orders)\n"

class OpenAiTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(workers=1)
        cls.cluster.__enter__()
        cls.cluster.wait_ready()
        cls.client = openai.OpenAI(base_url=cls.cluster.url + "/v1", api_key="none-needed", timeout=60)
        cls.port = cls.cluster.gateway_ports[0]

    @classmethod
    def tearDownClass(cls):
        cls.cluster.stop()

    def complete(self, **options):
        return self.client.completions.create(**{"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "seed": 7, **options})

    def test_models(self):
        models = self.client.models.list()
        self.assertIn(MODEL, [model.id for model in models])
        model = self.client.models.retrieve(MODEL)
        self.assertEqual((model.id, model.object), (MODEL, "model"))
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.models.retrieve("no-such-model")
        self.assertEqual(caught.exception.code, "model_not_found")

    def test_a_completion_repeats_and_counts(self):
        first, second = self.complete(), self.complete()
        self.assertEqual(first.choices[0].text, second.choices[0].text)
        self.assertEqual(first.object, "text_completion")
        self.assertIn(first.choices[0].finish_reason, ("stop", "length"))
        usage = first.usage
        self.assertGreater(usage.prompt_tokens, 0)
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        counters = usage.model_extra["diffusion"]
        self.assertGreater(counters["device_seconds"], 0)
        self.assertGreater(counters["steps"], 0)
        self.assertGreater(counters["forwards"], 0)
        self.assertGreaterEqual(counters["queue_seconds"], 0)
        self.assertTrue(first._request_id.startswith("req_"))

    def test_fill_in_the_middle(self):
        filled = self.complete(suffix=SUFFIX, max_tokens=3)
        self.assertIn("price", filled.choices[0].text)

    def test_fim_endpoint(self):
        status, reply, headers = post(self.port, "/v1/fim/completions", {
            "model": MODEL, "prompt": PROMPT, "suffix": SUFFIX, "max_tokens": 3, "seed": 7})
        self.assertEqual(status, 200, reply)
        self.assertIn("price", reply["choices"][0]["text"])
        self.assertIn("x-request-id", {name.lower() for name in headers})

    def test_a_stream_is_the_answer(self):
        whole = self.complete(max_tokens=24)
        pieces, reasons, usage, ids = [], [], None, set()
        for chunk in self.complete(max_tokens=24, stream=True, stream_options={"include_usage": True}):
            ids.add(chunk.id)
            if not chunk.choices:
                usage = chunk.usage
                continue
            pieces.append(chunk.choices[0].text)
            if chunk.choices[0].finish_reason:
                reasons.append(chunk.choices[0].finish_reason)
        self.assertEqual("".join(pieces), whole.choices[0].text)
        self.assertEqual(reasons, [whole.choices[0].finish_reason])
        self.assertEqual(len(ids), 1)
        self.assertEqual(usage.completion_tokens, whole.usage.completion_tokens)

    def test_several_choices_and_prompts(self):
        several = self.complete(n=3, temperature=0.8, max_tokens=8)
        self.assertEqual([choice.index for choice in several.choices], [0, 1, 2])
        again = self.complete(n=3, temperature=0.8, max_tokens=8)
        self.assertEqual([choice.text for choice in several.choices], [choice.text for choice in again.choices])
        prompts = self.complete(prompt=[PROMPT, "import "], max_tokens=4)
        self.assertEqual(len(prompts.choices), 2)

    def test_echo_and_stop(self):
        echoed = self.complete(echo=True, max_tokens=4)
        self.assertTrue(echoed.choices[0].text.startswith(PROMPT))
        full = self.complete(max_tokens=24).choices[0].text
        cut = next((c for c in full[1:] if not c.isspace()), None)
        if cut is not None:
            stopped = self.complete(max_tokens=24, stop=[cut])
            self.assertEqual(stopped.choices[0].text, full[:full.index(cut)])
            self.assertEqual(stopped.choices[0].finish_reason, "stop")

    def test_the_mask_token_in_a_prompt_is_text(self):
        for text in ("<mask>", "<|mask|>", "<|endoftext|>"):
            self.assertGreater(self.complete(prompt=text, max_tokens=4).usage.prompt_tokens, 1)

    def test_the_diffusion_contract(self):
        reply = self.complete(max_tokens=16, extra_body={"diffusion": {"sampler": "low_confidence", "steps": 4}})
        counters = reply.usage.model_extra["diffusion"]
        self.assertLessEqual(counters["steps"], 4)
        self.assertEqual(counters["sampler"], "low_confidence")
        self.assertGreaterEqual(counters["tokens_per_forward"], 2)
        for wrong, param in (({"steps": -1}, "diffusion.steps"), ({"sampler": "nope"}, "diffusion.sampler"),
                             ({"stepz": 4}, "diffusion.stepz"), ({"threshold": 2}, "diffusion.threshold")):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.complete(extra_body={"diffusion": wrong})
            self.assertEqual(caught.exception.param, param, wrong)

    def test_frames_and_snapshots(self):
        frames = [chunk for chunk in self.complete(max_tokens=12, stream=True, extra_body={"diffusion": {"frames": True}})
                  if chunk.choices and chunk.model_extra.get("diffusion")]
        self.assertGreater(len(frames), 1)
        steps = [frame.model_extra["diffusion"]["step"] for frame in frames]
        self.assertEqual(steps, list(range(1, len(steps) + 1)))
        snapshots = [data["choices"][0] for _, data in stream(self.port, "/v1/completions", {
            "model": MODEL, "prompt": PROMPT, "max_tokens": 12, "seed": 7, "diffusing": True}) if data["choices"]]
        self.assertEqual(snapshots[-1]["text"], self.complete(max_tokens=12).choices[0].text)
        self.assertIn("\u2591", snapshots[0]["text"])

    def test_errors_have_names(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            self.complete(model="gpt-5")
        self.assertEqual((caught.exception.code, caught.exception.param), ("model_not_found", "model"))
        for options, param in (({"max_tokens": 0}, "max_tokens"), ({"temperature": 3}, "temperature"),
                               ({"n": 1000}, "n"), ({"stop": ["a"] * 9}, "stop"), ({"prompt": []}, "prompt")):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.complete(**options)
            self.assertEqual(caught.exception.param, param, options)
        with self.assertRaises(openai.BadRequestError) as caught:
            self.complete(prompt="x " * 20000)
        self.assertEqual(caught.exception.code, "context_length_exceeded")
        self.assertTrue(caught.exception.request_id.startswith("req_"))

    def test_a_deadline_passes(self):
        client = self.client.with_options(max_retries=0)
        with self.assertRaises(openai.APIStatusError) as caught:
            client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100,
                                      extra_body={"diffusion": {"deadline_seconds": 0.001}})
        self.assertIn(caught.exception.status_code, (422, 504))

    def test_a_client_timeout_cancels(self):
        client = self.client.with_options(timeout=openai.Timeout(5, read=0.02), max_retries=0)
        with self.assertRaises(openai.APITimeoutError):
            client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=150)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if 'outcome="cancelled"' in get(self.port, "/metrics")[1].decode():
                return
            time.sleep(0.1)
        self.fail("the request was not cancelled")

    def test_idempotency_attaches(self):
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, "temperature": 0.9}
        headers = {"idempotency-key": f"key-{time.time()}"}
        replies = [None, None]

        def send(i):
            replies[i] = post(self.port, "/v1/completions", body, headers)

        threads = [threading.Thread(target=send, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(replies[0][0], 200, replies)
        self.assertEqual(replies[0][1]["choices"][0]["text"], replies[1][1]["choices"][0]["text"])
        status, reply, _ = post(self.port, "/v1/completions", {**body, "max_tokens": 15}, headers)
        self.assertEqual((status, reply["error"]["code"]), (422, "idempotency_mismatch"))

    def test_a_retry_after_a_broken_connection_attaches(self):
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 150, "seed": 8}
        whole = post(self.port, "/v1/completions", body)[1]["choices"][0]["text"]
        headers = {"idempotency-key": f"key-{time.time()}", "content-type": "application/json"}
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        link.request("POST", "/v1/completions", json.dumps({**body, "stream": True, "diffusing": True}), headers)
        first = link.getresponse()
        first.read(200)
        request = first.getheader("cinnabar-request-id")
        link.sock.shutdown(socket.SHUT_RDWR)  # gone in the middle, and the gateway sees it
        link.close()
        time.sleep(0.3)
        events = list(stream(self.port, "/v1/completions", {**body, "stream": True, "diffusing": True}, headers))
        self.assertEqual(events[-1][1]["choices"][0]["text"], whole)
        self.assertTrue(events[-1][0].startswith(request), (request, events[-1][0]))

    def test_a_broken_stream_resumes(self):
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 48, "seed": 3}
        whole = post(self.port, "/v1/completions", body)[1]["choices"][0]["text"]
        # The key says that the client comes back, so its leaving does not cancel at once.
        text, last = "", ""
        for event_id, data in stream(self.port, "/v1/completions", body, {"idempotency-key": f"key-{time.time()}"}):
            text += data["choices"][0]["text"]
            last = event_id
            if text:
                break
        self.assertTrue(last.startswith("req_"))
        rest = "".join(data["choices"][0]["text"] for _, data in stream(
            self.port, "/v1/completions", body, {"last-event-id": last}))
        self.assertEqual(text + rest, whole)
        # And as often as wanted from one that has ended, from any event.
        events = list(stream(self.port, "/v1/completions", body))
        half = len(events) // 2
        seen = "".join(data["choices"][0]["text"] for _, data in events[:half])
        rest = "".join(data["choices"][0]["text"] for _, data in stream(
            self.port, "/v1/completions", body, {"last-event-id": events[half - 1][0]}))
        self.assertEqual(seen + rest, whole)

    def test_metrics_and_health(self):
        self.assertEqual(get(self.port, "/healthz")[0], 200)
        status, text, _ = get(self.port, "/metrics")
        self.assertEqual(status, 200)
        self.assertIn(b"cinnabar_gateway_requests_total", text)

if __name__ == "__main__":
    unittest.main(verbosity=2)
