"""The checker finds what it is for: each broken history gives its violation, a sound one none."""
import unittest

from history import Observation, Seen, check

TEXTS = {"p": "hello"}


def answer(request="r1", **changes):
    seen = Seen("answer", "p", request, accepted=True, text="hello",
                observations=[Observation(0, [1, 2, 3]), Observation(3, [4, 5], final="done")])
    for name, value in changes.items():
        setattr(seen, name, value)
    return seen


class HistoryTest(unittest.TestCase):
    def expect(self, text, history, ledger, live=0, **more):
        wrong = check(history, ledger, live, TEXTS, **more)
        self.assertTrue(any(text in line for line in wrong), wrong)

    def test_a_sound_history(self):
        history = [answer(), answer("r2", observations=[Observation(0, [], final="done")]),
                   Seen("answer", "p", refused="rate_limit_exceeded"),
                   Seen("answer", "p"),  # its client never learned whether it was accepted
                   Seen("leaver", "p", "r3", accepted=True, observations=[Observation(0, [1])]),
                   Seen("poison", "p", "r4", accepted=True, observations=[Observation(0, [], final="request_failed")])]
        ledger = [("r1", "done"), ("r2", "done"), ("r3", "cancelled"), ("r4", "failed"), ("r5", "done")]
        self.assertEqual(check(history, ledger, 0, TEXTS), [])

    def test_lost(self):
        self.expect("accepted, and lost", [answer(observations=[Observation(0, [1, 2])])], [("r1", "done")])
        self.expect("accepted, and lost", [answer(observations=[Observation(0, [1], final="server_error")])], [("r1", "done")])
        self.expect("no ledger entry", [answer()], [])

    def test_ledger(self):
        self.expect("2 ledger entries", [answer()], [("r1", "done"), ("r1", "done")])
        self.expect("cancelled in the ledger", [answer()], [("r1", "cancelled")])
        self.expect("nobody made", [answer()], [("r1", "done"), ("r9", "done")])
        self.expect("refused with", [Seen("answer", "p", "r1", refused="overloaded")], [("r1", "done")])

    def test_events(self):
        self.expect("step 3 came after step 1", [answer(observations=[Observation(0, [1, 3], final="done")])], [("r1", "done")])
        self.expect("step 2 came after step 2", [answer(observations=[Observation(0, [1, 2, 2], final="done")])], [("r1", "done")])
        self.expect("step 5 came after step 3",
                    [answer(observations=[Observation(0, [1, 2, 3]), Observation(3, [5], final="done")])], [("r1", "done")])

    def test_contents(self):
        frames = {"p": {1: "a", 2: "b"}}

        def framed(*parts):
            observations = [Observation(after, list(part), dict(part)) for after, part in parts]
            observations[-1].final = "done"
            return [answer(observations=observations)]

        self.assertEqual(check(framed((0, {1: "a"}), (1, {2: "b"})), [("r1", "done")], 0, TEXTS, frames), [])
        self.expect("step 1 contradicts", framed((0, {1: "a"}), (0, {1: "x", 2: "b"})), [("r1", "done")], frames=frames)
        self.expect("step 2 is not that", framed((0, {1: "a", 2: "x"})), [("r1", "done")], frames=frames)
        self.expect("step 3 is not that", framed((0, {1: "a", 2: "b", 3: "c"})), [("r1", "done")], frames=frames)
        self.expect("without steps [2]", framed((0, {1: "a"})), [("r1", "done")], frames=frames)

    def test_what_a_rewind_may_take(self):
        lost = answer(began=10.0, ended=10.4)
        self.assertEqual(check([lost], [], 0, TEXTS, rewinds=[(9.9, 10.5)]), [])
        for window in ((10.1, 10.5), (9.9, 10.3)):  # it lived before, or its gateway still held it
            self.expect("no ledger entry", [lost], [], rewinds=[window])

    def test_ends_that_were_asked_for(self):
        def ended(kind, final, state, **more):
            return [Seen(kind, "p", "r1", accepted=True, observations=[Observation(0, [], {}, final)], **more)], [("r1", state)]

        for kind, final, state in (("canceller", "cancelled", "cancelled"), ("canceller", "done", "done"),
                                   ("late", "deadline_exceeded", "expired"), ("late", "done", "done")):
            self.assertEqual(check(*ended(kind, final, state), 0, TEXTS), [])
        for kind, final, state in (("canceller", "done", "cancelled"), ("canceller", "cancelled", "done"),
                                   ("late", "done", "expired"), ("late", "request_failed", "failed")):
            self.expect(f"a {kind} heard", *ended(kind, final, state))
            # Only within a rewind may another end have come afterwards, and only a sound one.
            wrong = check(*ended(kind, final, state, ended=5.0), 0, TEXTS, rewinds=[(4.0, 6.0)])
            self.assertEqual(bool(wrong), state == "failed", wrong)

    def test_ends(self):
        self.expect("different ways",
                    [answer(observations=[Observation(0, [1], final="done"), Observation(1, [], final="cancelled")])], [("r1", "done")])
        self.expect("differs", [answer(text="hellO")], [("r1", "done")])
        self.expect("poison ended", [Seen("poison", "p", "r1", accepted=True, observations=[Observation(0, [], final="done")])],
                    [("r1", "done")])
        self.expect("under way", [answer()], [("r1", "done")], live=1)
        self.expect("its client left", [Seen("leaver", "p", "r1", accepted=True)], [("r1", "failed")])


if __name__ == "__main__":
    unittest.main(verbosity=2)
