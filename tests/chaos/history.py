"""What clients saw of the service and what Redis holds in the end, and whether the promises held. Pure.

A history is a list of `Seen`, one for each request a client made, with an `Observation` for each connection it took.
"""
import dataclasses


@dataclasses.dataclass
class Observation:
    """One connection. `after`: the step that the client had already; `steps`: of the frames that came, in order."""
    after: int = 0
    steps: list = dataclasses.field(default_factory=list)
    final: str = ""  # "done", an error's code, or "": broken off


@dataclasses.dataclass
class Seen:
    kind: str  # "answer": the client wants one; "leaver": it goes away in the middle; "poison": it breaks its worker
    profile: str
    request: str = ""      # its id; empty when no answer ever told it
    accepted: bool = False  # the client has a reply that says so
    refused: str = ""       # the code of a refusal (429, 503, ...): then it must leave no trace
    text: str = None        # the whole answer
    observations: list = dataclasses.field(default_factory=list)


def check(history, ledger, live, references):
    """The violations, a line each. `ledger`: (request id, state) of every entry; `live`: requests that Redis still counts
    as under way, after everything ended; `references`: profile -> the undisturbed answer."""
    wrong = []
    entries = {}
    for request, state in ledger:
        entries.setdefault(request, []).append(state)
    for request, states in entries.items():
        if len(states) > 1:
            wrong.append(f"{request}: {len(states)} ledger entries: {', '.join(states)}")
    known = set()
    for seen in history:
        name = seen.request or f"a {seen.kind} of {seen.profile}"
        if seen.request:
            known.add(seen.request)
        states = entries.get(seen.request, [])
        for number, observation in enumerate(seen.observations):
            expected = observation.after
            for step in observation.steps:
                if step != expected + 1:
                    wrong.append(f"{name}: connection {number}: step {step} came after step {expected}")
                    break
                expected = step
        finals = {observation.final for observation in seen.observations if observation.final}
        if len(finals) > 1:
            wrong.append(f"{name}: ended in different ways: {', '.join(sorted(finals))}")
        if seen.refused:
            if states:
                wrong.append(f"{name}: refused with {seen.refused}, yet in the ledger as {states[0]}")
            continue
        if not seen.accepted:
            continue
        if not states:
            wrong.append(f"{name}: accepted, and no ledger entry")
        if seen.kind == "answer":
            if finals != {"done"}:
                wrong.append(f"{name}: accepted, and lost: {', '.join(finals) or 'no end'}")
            elif seen.text != references[seen.profile]:
                wrong.append(f"{name}: its text differs from the undisturbed run: {seen.text!r}")
            if states and states[0] != "done":
                wrong.append(f"{name}: answered, and {states[0]} in the ledger")
        elif seen.kind == "leaver" and states and states[0] not in ("cancelled", "done"):
            wrong.append(f"{name}: its client left, and it is {states[0]}")
        elif seen.kind == "poison":
            if "done" in finals or (states and states[0] != "failed"):
                wrong.append(f"{name}: poison ended as {', '.join(finals)}, in the ledger {states}")
    strangers = set(entries) - known
    unknown = sum(1 for seen in history if not seen.request)
    if len(strangers) > unknown:
        wrong.append(f"{len(strangers)} ledger entries of requests that nobody made: {sorted(strangers)[:3]}")
    if live:
        wrong.append(f"{live} requests are under way though every client is gone")
    return wrong
