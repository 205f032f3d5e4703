"""What clients saw of the service and what Redis holds in the end, and whether the promises held. Pure.

A history is a list of `Seen`, one for each request a client made, with an `Observation` for each connection it took.
"""
import dataclasses


@dataclasses.dataclass
class Observation:
    """One connection. `after`: the step that the client had already; `steps`: of the frames that came, in order."""
    after: int = 0
    steps: list = dataclasses.field(default_factory=list)
    frames: dict = dataclasses.field(default_factory=dict)  # step -> its content, of those frames
    final: str = ""  # "done", an error's code, or "": broken off


@dataclasses.dataclass
class Seen:
    kind: str  # "answer": the client wants one; "leaver": it goes away in the middle; "poison": it breaks its worker;
    #            "canceller": it asks for the end; "late": its deadline is too short
    profile: str
    request: str = ""      # its id; empty when no answer ever told it
    accepted: bool = False  # the client has a reply that says so
    refused: str = ""       # the code of a refusal (429, 503, ...): then it must leave no trace
    text: str = None        # the whole answer
    observations: list = dataclasses.field(default_factory=list)
    began: float = 0.0  # seconds of the run: the first try, and the last thing that came
    ended: float = 0.0


# What a client that asked for it hears of its own end: the ledger's state -> the codes.
ENDS = {"canceller": {"cancelled": {"cancelled", "request_cancelled", ""}, "done": {"done", ""}},
        "late": {"expired": {"deadline_exceeded", ""}, "done": {"done", ""}, "cancelled": {"deadline_infeasible", ""}}}


def forgotten(seen, rewinds):
    """Redis may have lost all of it: it began within what a rewind took back, and no gateway held it any more: it ended by
    then, or its client went away while Redis was down."""
    return any(since <= seen.began <= until and (seen.ended <= until or seen.kind in ("leaver", "canceller"))
               for since, until in rewinds)


def check(history, ledger, live, references, frames=None, rewinds=()):
    """The violations, a line each. `ledger`: (request id, state) of every entry; `live`: requests that Redis still counts
    as under way, after everything ended; `references`: profile -> the undisturbed answer; `frames`: profile -> step -> the
    undisturbed content of that step (None: not compared); `rewinds`: (since, until), writes of which Redis was made to forget."""
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
        whole = (frames or {}).get(seen.profile)
        met = {}
        for number, observation in enumerate(seen.observations):
            for step, content in observation.frames.items():
                if met.setdefault(step, content) != content:
                    wrong.append(f"{name}: connection {number}: step {step} contradicts what it was before")
                elif whole is not None and whole.get(step) != content:
                    wrong.append(f"{name}: connection {number}: step {step} is not that of the undisturbed run")
        finals = {observation.final for observation in seen.observations if observation.final}
        if len(finals) > 1:
            wrong.append(f"{name}: ended in different ways: {', '.join(sorted(finals))}")
        if seen.refused:
            if states:
                wrong.append(f"{name}: refused with {seen.refused}, yet in the ledger as {states[0]}")
            continue
        if not seen.accepted:
            continue
        if not states and not forgotten(seen, rewinds):
            wrong.append(f"{name}: accepted, and no ledger entry ({seen.kind}, {seen.began:.1f} s to {seen.ended:.1f} s)")
        if seen.kind == "answer":
            if finals != {"done"}:
                wrong.append(f"{name}: accepted, and lost: {', '.join(finals) or 'no end'}")
            elif seen.text != references[seen.profile]:
                wrong.append(f"{name}: its text differs from the undisturbed run: {seen.text!r}")
            if met and whole is not None and finals == {"done"} and set(met) != set(whole):
                wrong.append(f"{name}: answered without steps {sorted(set(whole) - set(met))[:5]}")
            if states and states[0] != "done":
                wrong.append(f"{name}: answered, and {states[0]} in the ledger")
        elif seen.kind == "leaver" and states and states[0] not in ("cancelled", "done"):
            wrong.append(f"{name}: its client left, and it is {states[0]}")
        elif seen.kind in ENDS and states:
            said = finals or {""}
            if states[0] not in ENDS[seen.kind] or not said <= ENDS[seen.kind][states[0]]:
                rewound = any(since <= seen.ended <= until for since, until in rewinds)  # its end was taken back, and came anew
                if not rewound or states[0] not in ENDS[seen.kind]:
                    wrong.append(f"{name}: a {seen.kind} heard {', '.join(sorted(said))}, and it is {states[0]} in the ledger")
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
