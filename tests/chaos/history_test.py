"""The checker finds what it is for: each broken history gives its violation, a sound one none."""
import unittest

from history import Observation, Seen, check

TEXTS = {"p": "hello"}


def answer(request="r1", **changes):
    seen = Seen("answer", "p", request, accepted=True, text="hello",
                observations=[Observation(0, [1, 2, 3]), Observation(3, [4, 5], "done")])
    for name, value in changes.items():
        setattr(seen, name, value)
    return seen


class HistoryTest(unittest.TestCase):
    def expect(self, text, history, ledger, live=0):
        wrong = check(history, ledger, live, TEXTS)
        self.assertTrue(any(text in line for line in wrong), wrong)

    def test_a_sound_history(self):
        history = [answer(), answer("r2", observations=[Observation(0, [], "done")]),
                   Seen("answer", "p", refused="rate_limit_exceeded"),
                   Seen("answer", "p"),  # its client never learned whether it was accepted
                   Seen("leaver", "p", "r3", accepted=True, observations=[Observation(0, [1])]),
                   Seen("poison", "p", "r4", accepted=True, observations=[Observation(0, [], "request_failed")])]
        ledger = [("r1", "done"), ("r2", "done"), ("r3", "cancelled"), ("r4", "failed"), ("r5", "done")]
        self.assertEqual(check(history, ledger, 0, TEXTS), [])

    def test_lost(self):
        self.expect("accepted, and lost", [answer(observations=[Observation(0, [1, 2])])], [("r1", "done")])
        self.expect("accepted, and lost", [answer(observations=[Observation(0, [1], "server_error")])], [("r1", "done")])
        self.expect("no ledger entry", [answer()], [])

    def test_ledger(self):
        self.expect("2 ledger entries", [answer()], [("r1", "done"), ("r1", "done")])
        self.expect("cancelled in the ledger", [answer()], [("r1", "cancelled")])
        self.expect("nobody made", [answer()], [("r1", "done"), ("r9", "done")])
        self.expect("refused with", [Seen("answer", "p", "r1", refused="overloaded")], [("r1", "done")])

    def test_events(self):
        self.expect("step 3 came after step 1", [answer(observations=[Observation(0, [1, 3], "done")])], [("r1", "done")])
        self.expect("step 2 came after step 2", [answer(observations=[Observation(0, [1, 2, 2], "done")])], [("r1", "done")])
        self.expect("step 5 came after step 3",
                    [answer(observations=[Observation(0, [1, 2, 3]), Observation(3, [5], "done")])], [("r1", "done")])

    def test_ends(self):
        self.expect("different ways",
                    [answer(observations=[Observation(0, [1], "done"), Observation(1, [], "cancelled")])], [("r1", "done")])
        self.expect("differs", [answer(text="hellO")], [("r1", "done")])
        self.expect("poison ended", [Seen("poison", "p", "r1", accepted=True, observations=[Observation(0, [], "done")])],
                    [("r1", "done")])
        self.expect("under way", [answer()], [("r1", "done")], live=1)
        self.expect("its client left", [Seen("leaver", "p", "r1", accepted=True)], [("r1", "failed")])


if __name__ == "__main__":
    unittest.main(verbosity=2)
