"""The gateway over gRPC with the official client: Generate, Cancel, Resume, ListModels, health, reflection, errors.

The stubs are generated from proto/ when the test starts, so that they are those of this tree.
Run by ctest; alone: tests/cluster/with_client.sh tests/cluster/grpc_test.py
"""
import os
import sys
import tempfile
import threading
import time
import unittest

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_tools import protoc

from cluster import SOURCE, Cluster, get, post

STUBS = tempfile.TemporaryDirectory(prefix="cinnabar_stubs_")
PROTO = os.path.join(SOURCE, "proto")
if protoc.main(["protoc", f"-I{PROTO}", f"--python_out={STUBS.name}", f"--grpc_python_out={STUBS.name}",
                "cinnabar/v1/generation.proto", "cinnabar/v1/sequence.proto"]) != 0:
    sys.exit("the stubs cannot be generated")
sys.path.insert(0, STUBS.name)
from cinnabar.v1 import generation_pb2 as pb  # noqa: E402
from cinnabar.v1 import generation_pb2_grpc, sequence_pb2  # noqa: E402

MODEL = "cinnabar-tiny"
PROMPT = 'def total_price(orders):\n    """Return the sum of price over all orders."""\n    return sum(order'
SERVICE = "cinnabar.v1.Generation"
Code = grpc.StatusCode


def wanted(**fields):
    fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "params": {"seed": 7}, **fields}
    if "chat" in fields or "tokens" in fields:
        del fields["prompt"]
    return pb.GenerateRequest(**fields)


def text_of(events, choice=0):
    return "".join(event.text for event in events if event.choice == choice)


class GrpcTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(workers=1, gateway_args=["--alias", f"coder={MODEL}", "--price-output", "2",
                                                       "--body-kib", "64", "--threads", "2"])
        cls.cluster.__enter__()
        cls.cluster.wait_ready()
        cls.http = cls.cluster.gateway_ports[0]
        cls.channel = grpc.insecure_channel(f"127.0.0.1:{cls.cluster.grpc_ports[0]}")
        cls.stub = generation_pb2_grpc.GenerationStub(cls.channel)

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        cls.cluster.stop()

    def tearDown(self):
        self.assertTrue(list(self.stub.Generate(wanted(max_tokens=2), timeout=30))[-1].done)

    def refused(self, call, code, error_code=None, mentions=""):
        """The RpcError of a call that must fail."""
        with self.assertRaises(grpc.RpcError) as caught:
            list(call) if hasattr(call, "__iter__") else call()
        error = caught.exception
        self.assertEqual(error.code(), code, error.details())
        self.assertIn(mentions, error.details())
        trailers = dict(error.trailing_metadata() or ())
        if error_code is not None:
            self.assertEqual(trailers.get("error-code"), error_code)
        return error, trailers

    def test_a_stream_is_what_http_gives(self):
        events = list(self.stub.Generate(wanted(), timeout=60))
        status, reply, _ = post(self.http, "/v1/completions", {
            "model": MODEL, "prompt": PROMPT, "max_tokens": 24, "seed": 7})
        self.assertEqual(status, 200, reply)
        self.assertEqual(text_of(events), reply["choices"][0]["text"])
        self.assertEqual([event.done for event in events], [False] * (len(events) - 1) + [True])
        self.assertEqual(events[-1].finish_reason, reply["choices"][0]["finish_reason"])
        self.assertEqual(len({event.request_id for event in events}), 1)
        self.assertRegex(events[0].request_id, r"^req_[0-9a-f]{32}$")
        usage = events[-1].usage
        self.assertEqual(usage.prompt_tokens, reply["usage"]["prompt_tokens"])
        self.assertEqual(usage.completion_tokens, reply["usage"]["completion_tokens"])
        self.assertGreater(usage.forwards, 0)
        self.assertGreater(usage.device_seconds, 0)
        self.assertGreater(usage.price_dollars, 0)
        self.assertTrue(usage.sampler)

    def test_fill_in_the_middle_and_stop(self):
        suffix = " for order in orders)\n"
        events = list(self.stub.Generate(wanted(suffix=suffix, max_tokens=3), timeout=60))
        self.assertIn("price", text_of(events))
        whole = text_of(self.stub.Generate(wanted(), timeout=60))
        cut = next(c for c in whole[1:] if not c.isspace())
        events = list(self.stub.Generate(wanted(stop=[cut]), timeout=60))
        self.assertEqual(text_of(events), whole[:whole.index(cut)])
        self.assertEqual(events[-1].finish_reason, "stop")

    def test_choices_and_tokens(self):
        events = list(self.stub.Generate(wanted(n=3, max_tokens=8, params={"seed": 7, "temperature": 0.8}), timeout=60))
        done = sorted(event.choice for event in events if event.done)
        self.assertEqual(done, [0, 1, 2])
        tokens = list(self.stub.Generate(wanted(tokens={"ids": [5, 6, 7]}, max_tokens=4), timeout=60))
        self.assertEqual(tokens[-1].usage.prompt_tokens, 3)

    def test_frames_show_every_step(self):
        events = list(self.stub.Generate(wanted(frames=True, max_tokens=12), timeout=60))
        frames = [event.frame for event in events if event.HasField("frame")]
        self.assertEqual([frame.step for frame in frames], list(range(1, len(frames) + 1)))
        positions = [position for frame in frames for position in frame.positions]
        self.assertEqual(sorted(positions), sorted(set(positions)))
        self.assertTrue(set(positions) <= set(range(12)))
        for frame in frames:
            self.assertEqual(len(frame.positions), len(frame.tokens))
            self.assertTrue(all(0 <= confidence <= 1 for confidence in frame.confidences))
        ends = [frame.final_end for frame in frames]
        self.assertEqual(ends, sorted(ends))

    def test_what_is_taken_back_shows_in_frames_and_never_was_text(self):
        cases = [{"sampler": "remdm_cap", "num_steps": 24, "eta": 0.3, "temperature": 0.8},
                 {"sampler": "p2", "num_steps": 12},
                 {"sampler": "joint_threshold", "block_length": 8, "threshold": 0.3, "edit_threshold": 0.05}]
        taken_back = 0
        for params in cases:
            canvas, final_end, decided = {}, 0, 0
            request = wanted(frames=True, params={"seed": 7, **params})
            events = list(self.stub.Generate(request, timeout=60))
            for event in events:
                if event.text and not event.done:
                    self.assertGreater(event.frame.final_end if event.HasField("frame") else final_end, 0)
                for position, token in zip(event.frame.positions, event.frame.tokens):
                    self.assertGreaterEqual(position, final_end)
                    if token < 0:
                        del canvas[position]
                        taken_back += 1
                    else:
                        canvas[position] = token
                        decided += 1
                final_end = max(final_end, event.frame.final_end)
            usage = events[-1].usage
            self.assertEqual(sorted(canvas), list(range(final_end)))
            self.assertGreaterEqual(decided, final_end)
            self.assertLessEqual(usage.tokens_per_forward * usage.forwards, 24.001)
            plain = wanted(params={"seed": 7, **params})
            self.assertEqual(text_of(self.stub.Generate(plain, timeout=60)), text_of(events))
        self.assertGreater(taken_back, 0)

    def test_a_broken_stream_resumes(self):
        request = wanted(max_tokens=48)
        events = list(self.stub.Generate(request, timeout=60))
        whole = text_of(events)
        for index in {0, len(events) // 2, len(events) - 2}:
            rest = list(self.stub.Resume(pb.ResumeRequest(request=request, after_event_id=events[index].id), timeout=60))
            self.assertEqual(text_of(events[:index + 1]) + text_of(rest), whole, index)
            self.assertTrue(rest[-1].done)
            self.assertEqual(rest[-1].request_id, events[0].request_id)
        for wrong in ("", "nonsense", "req_1:1,2", "r{x}:1", "::"):
            self.refused(self.stub.Resume(pb.ResumeRequest(request=request, after_event_id=wrong), timeout=30),
                         Code.INVALID_ARGUMENT, "invalid_value", "Last-Event-ID")
        self.refused(self.stub.Resume(pb.ResumeRequest(request=request, after_event_id="req_1:1"), timeout=30),
                     Code.NOT_FOUND, "not_found")

    def test_cancel_ends_the_stream(self):
        call = self.stub.Generate(wanted(max_tokens=150, frames=True, params={"seed": 1, "num_steps": 150}), timeout=60)
        first = next(iter(call))
        reply = self.stub.Cancel(pb.CancelRequest(request_id=first.request_id), timeout=30)
        self.assertEqual(reply.state, "cancelled")
        self.refused(call, Code.CANCELLED, "cancelled")
        # Again, and after an end: the state it has.
        again = self.stub.Cancel(pb.CancelRequest(request_id=first.request_id), timeout=30)
        self.assertEqual(again.state, "cancelled")
        done = list(self.stub.Generate(wanted(max_tokens=2), timeout=60))
        self.assertEqual(self.stub.Cancel(pb.CancelRequest(request_id=done[0].request_id), timeout=30).state, "done")
        for wrong in ("", "req_0", "a b", "r" * 200):
            self.refused(lambda name=wrong: self.stub.Cancel(pb.CancelRequest(request_id=name), timeout=30),
                         Code.NOT_FOUND, "not_found")

    def metric(self, pattern):
        text = get(self.http, "/metrics")[1].decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
                   if line.startswith(pattern[0]) and all(part in line for part in pattern[1:]))

    def test_a_client_that_leaves_cancels_its_work(self):
        cancelled = ("cinnabar_gateway_requests_total", 'proto="grpc"', 'outcome="cancelled"')
        before = self.metric(cancelled)
        calls = [self.stub.Generate(wanted(max_tokens=150, frames=True, params={"seed": i + 1, "num_steps": 150}))
                 for i in range(4)]
        next(iter(calls[0]))
        for call in calls:
            call.cancel()
        end = time.monotonic() + 20
        while time.monotonic() < end and (self.metric(cancelled) < before + 4 or self.metric(
                ("cinnabar_gateway_open_streams", 'proto="grpc"')) > 0):
            time.sleep(0.05)
        # One that left before it was admitted never was a stream of this gateway's.
        self.assertGreaterEqual(self.metric(cancelled), before + 1)
        self.assertEqual(self.metric(("cinnabar_gateway_open_streams", 'proto="grpc"')), 0)

    def test_the_deadline_of_the_call_counts(self):
        with self.assertRaises(grpc.RpcError) as caught:
            list(self.stub.Generate(wanted(max_tokens=150, params={"num_steps": 150}), timeout=0.05))
        self.assertEqual(caught.exception.code(), Code.DEADLINE_EXCEEDED)
        self.refused(self.stub.Generate(wanted(max_tokens=150, deadline_seconds=0.001), timeout=30),
                     Code.DEADLINE_EXCEEDED)

    def test_idempotency(self):
        request = wanted(max_tokens=8, idempotency_key=f"key {time.time()}")
        first = list(self.stub.Generate(request, timeout=60))
        again = list(self.stub.Generate(request, timeout=60))
        self.assertEqual(first[0].request_id, again[0].request_id)
        self.assertEqual(text_of(first), text_of(again))
        request.max_tokens = 7
        self.refused(self.stub.Generate(request, timeout=60), Code.FAILED_PRECONDITION, "idempotency_mismatch")

    def test_many_streams_at_once(self):
        results = [None] * 24

        def run(i):
            results[i] = list(self.stub.Generate(wanted(max_tokens=8, params={"seed": i % 4 + 1, "temperature": 0.7}),
                                                 timeout=120))

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, events in enumerate(results):
            self.assertTrue(events and events[-1].done)
            self.assertEqual(text_of(events), text_of(results[i % 4]))  # alone or in any batch

    def test_wrong_requests_name_their_field(self):
        nan = float("nan")
        for fields, code, error_code, field in (
                ({"model": ""}, Code.INVALID_ARGUMENT, "missing_required_parameter", "model"),
                ({"model": "none"}, Code.NOT_FOUND, "model_not_found", "model"),
                ({"tokens": {"ids": [-1]}}, Code.INVALID_ARGUMENT, "invalid_value", "prompt"),
                ({"tokens": {"ids": [10**6]}}, Code.INVALID_ARGUMENT, "invalid_value", "prompt"),
                ({"chat": {}}, Code.INVALID_ARGUMENT, "invalid_value", "chat.messages"),
                ({"chat": {"messages": [{"role": "king", "content": "x"}]}}, Code.INVALID_ARGUMENT, "invalid_value",
                 "role"),
                # This model has no chat template.
                ({"chat": {"messages": [{"role": "user", "content": "x"}]}}, Code.INVALID_ARGUMENT, None, "chat template"),
                ({"chat": {"messages": [{"role": "user", "content": "x"}]}, "suffix": "y"}, Code.INVALID_ARGUMENT,
                 "invalid_value", "suffix"),
                ({"n": -1}, Code.INVALID_ARGUMENT, "invalid_value", "n"),
                ({"n": 17}, Code.INVALID_ARGUMENT, "invalid_value", "n"),
                ({"max_tokens": -1}, Code.INVALID_ARGUMENT, "invalid_value", "max_tokens"),
                ({"max_tokens": 2**31 - 1}, Code.INVALID_ARGUMENT, "invalid_value", "max_tokens"),
                ({"prompt": "x y " * 4000}, Code.INVALID_ARGUMENT, "context_length_exceeded", "prompt"),
                ({"stop": list("abcde")}, Code.INVALID_ARGUMENT, "invalid_value", "stop"),
                ({"stop": [""]}, Code.INVALID_ARGUMENT, "invalid_value", "stop"),
                ({"stop": ["s" * 300]}, Code.INVALID_ARGUMENT, "invalid_value", "stop"),
                ({"priority": "urgent"}, Code.INVALID_ARGUMENT, "invalid_value", "priority"),
                ({"deadline_seconds": -1}, Code.INVALID_ARGUMENT, "invalid_value", "deadline_seconds"),
                ({"deadline_seconds": 1e9}, Code.INVALID_ARGUMENT, "invalid_value", "deadline_seconds"),
                ({"params": {"sampler": "magic"}}, Code.INVALID_ARGUMENT, "invalid_value", "sampler"),
                ({"params": {"num_steps": -1}}, Code.INVALID_ARGUMENT, "invalid_value", "num_steps"),
                ({"params": {"num_steps": 2**31 - 1}}, Code.INVALID_ARGUMENT, "invalid_value", "num_steps"),
                ({"params": {"block_length": -1}}, Code.INVALID_ARGUMENT, "invalid_value", "block_length"),
                ({"params": {"temperature": -1}}, Code.INVALID_ARGUMENT, "invalid_value", "temperature"),
                ({"params": {"temperature": nan}}, Code.INVALID_ARGUMENT, "invalid_value", "temperature"),
                ({"params": {"temperature": float("inf")}}, Code.INVALID_ARGUMENT, "invalid_value", "temperature"),
                ({"params": {"top_p": 5}}, Code.INVALID_ARGUMENT, "invalid_value", "top_p"),
                ({"params": {"top_k": -5}}, Code.INVALID_ARGUMENT, "invalid_value", "top_k"),
                ({"params": {"threshold": nan}}, Code.INVALID_ARGUMENT, "invalid_value", "threshold"),
                ({"params": {"forbidden_ids": [5]}}, Code.INVALID_ARGUMENT, "unsupported_parameter", "forbidden_ids"),
                ({"params": {"pickable_ids": 5}}, Code.INVALID_ARGUMENT, "unsupported_parameter", "pickable_ids")):
            with self.subTest(str(fields)[:80]):
                self.refused(self.stub.Generate(wanted(**fields), timeout=30), code, error_code, field)
        self.refused(self.stub.Generate(pb.GenerateRequest(model=MODEL), timeout=30), Code.INVALID_ARGUMENT,
                     "missing_required_parameter", "prompt")
        # Larger than a message may be: gRPC itself refuses it.
        self.refused(self.stub.Generate(wanted(prompt="x" * 100000), timeout=30), Code.RESOURCE_EXHAUSTED)
        unknown = self.channel.unary_unary(f"/{SERVICE}/Nothing")
        self.refused(lambda: unknown(b"", timeout=30), Code.UNIMPLEMENTED)
        broken = self.channel.unary_unary(f"/{SERVICE}/Cancel")
        with self.assertRaises(grpc.RpcError):
            broken(b"\xff\xff\xff", timeout=30)

    def test_models(self):
        models = self.stub.ListModels(pb.ListModelsRequest(), timeout=30).models
        self.assertEqual([model.name for model in models], [MODEL])
        model = models[0]
        self.assertEqual(list(model.aliases), ["coder"])
        self.assertTrue(model.ready and model.family and model.default_sampler)
        self.assertGreaterEqual(model.context_tokens_max, 2)
        by_alias = list(self.stub.Generate(wanted(model="coder", max_tokens=4), timeout=60))
        self.assertEqual(text_of(by_alias), text_of(self.stub.Generate(wanted(max_tokens=4), timeout=60)))

    def test_health_and_reflection(self):
        health = health_pb2_grpc.HealthStub(self.channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        for service in ("", SERVICE):
            self.assertEqual(health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status, serving)
        self.refused(lambda: health.Check(health_pb2.HealthCheckRequest(service="none"), timeout=30), Code.NOT_FOUND)
        # ServerReflectionRequest{list_services: ""}; field 7, empty.
        info = self.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        listed = next(iter(info(iter([b"\x3a\x00"]), timeout=30)))
        self.assertIn(SERVICE.encode(), listed)

    def test_a_gateway_that_stops_says_so(self):
        with Cluster(workers=1) as cluster:
            cluster.wait_ready()
            with grpc.insecure_channel(f"127.0.0.1:{cluster.grpc_ports[0]}") as channel:
                stub = generation_pb2_grpc.GenerationStub(channel)
                call = stub.Generate(wanted(max_tokens=64, frames=True, params={"seed": 1, "num_steps": 64}), timeout=60)
                events = [next(iter(call))]
                stopped = []
                stopper = threading.Thread(target=lambda: stopped.append(cluster.gateways[0].stop()))
                stopper.start()
                events += list(call)  # what runs is finished
                stopper.join()
                self.assertTrue(events[-1].done)
                self.assertEqual(stopped, [0])
                self.refused(stub.Generate(wanted(), timeout=10), Code.UNAVAILABLE)


if __name__ == "__main__":
    unittest.main(verbosity=2)
