"""The planted bugs. An old text stands exactly once in its file; whoever changes that line changes it here, too.

None is here that changes nothing that can be seen: such a one says nothing about the tests.
"""

from collections.abc import Mapping, Sequence

from attrs import frozen


@frozen
class Mutant:
    """One bug.

    Attributes:
        file: Below the package.
        old: What stands there.
        new: The bug.
        why: What it breaks.
    """

    file: str
    old: str
    new: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}: {self.why}"


SUITES: Mapping[str, Sequence[str]] = {
    "_admission.py": ("test_admission.py", "proof/test_random_groups.py", "test_flow.py", "test_waiting.py"),
    "_claim_queue.py": ("test_claim_queue.py", "test_claims.py", "test_locks.py", "test_waiting.py"),
    "_claims.py": ("test_claims.py",),
    "_holding.py": ("test_holding.py", "test_locks.py", "test_waiting.py"),
    "_run.py": (
        "proof/test_random_groups.py",
        "test_executor.py",
        "test_flow.py",
        "test_cancellation.py",
        "test_waiting.py",
        "test_nesting.py",
        "test_shutdown.py",
        "test_struck.py",
    ),
    "_shutdown.py": ("test_shutdown.py", "proof/test_cancellation.py"),
    "_stream.py": ("test_stream.py", "proof/test_cancellation.py"),
    "_tools.py": ("test_tools.py", "proof/test_cancellation.py"),
    "_traces.py": ("test_cancellation.py", "test_executor.py", "test_struck.py"),
    "engines/_program.py": ("test_process_engine.py", "proof/test_process_trees.py"),
    "engines/process.py": ("test_process_engine.py", "proof/test_process_trees.py"),
    "locks/memory.py": ("test_locks.py", "proof/test_cancellation.py", "test_waiting.py"),
}
"""The tests that run against a bug in a file, those that find most first."""


PLANTED = (
    # Which assignment may start
    Mutant("_admission.py", "self._running >= self.limit", "self._running > self.limit", "one too many runs"),
    Mutant("_admission.py", "heappop(self._returned)", "self._returned.pop()", "the last one goes first"),
    Mutant("_admission.py", "if self._tickets:", "if not self._tickets:", "claims inside the group stay taken"),
    Mutant("_admission.py", "self._unmet[dependent] -= 1", "self._unmet[dependent] = 0", "one success is enough"),
    Mutant("_admission.py", "self._unmet[position] = -1", "self._unmet[position] = 1", "what was given up starts"),
    Mutant(
        "_admission.py",
        "        self._returned.clear()\n        self.has_ready = False",
        "        pass",
        "those that were next start after the end",
    ),
    Mutant("_admission.py", "self._move_on(self._next)", "pass", "what was taken out starts"),
    Mutant("_admission.py", "self._postponed.add(position)", "pass", "who waits for claims is forgotten"),
    # Who may hold what
    Mutant("_claim_queue.py", " AT_SHARED: (AT, BELOW)", " AT_SHARED: (AT,)", "files change in a folder that is read"),
    Mutant("_claim_queue.py", " BELOW: (AT, AT_SHARED)", " BELOW: (AT,)", "a file changes in a folder that is read"),
    Mutant("_claim_queue.py", " BELOW_SHARED: (AT,)", " BELOW_SHARED: ()", "a folder changes while a file is read"),
    Mutant("_claim_queue.py", "if other.owner != ticket.owner:", "if True:", "a holder is in its own way"),
    Mutant(
        "_claim_queue.py",
        "                if not any(shelves):",
        "                if False:",
        "what nobody holds is remembered",
    ),
    Mutant("_claim_queue.py", "            self._watch(other)", "            pass", "all who wait go on at once"),
    Mutant(
        "_claim_queue.py",
        "if other.waits_for is None:\n                    return other.owner",
        "return other.owner",
        "who waits is told as the holder",
    ),
    Mutant("_claims.py", "found.st_nlink > 1", "found.st_nlink > 2", "two names of one file are two resources"),
    Mutant("_claims.py", "os.path.realpath(text)", "os.path.abspath(text)", "a symbolic link is another resource"),
    # What a group holds
    Mutant(
        "_holding.py", "for position in tuple(self.leases):", "for position in ():", "nothing is swept up at the end"
    ),
    Mutant(
        "_holding.py",
        "fail_after(RELEASE_SECONDS, shield=True)",
        "fail_after(RELEASE_SECONDS)",
        "giving back is cancelled",
    ),
    Mutant(
        "_holding.py",
        "self._attempted.append(resource)  #",
        "self._attempted.insert(0, resource)  #",
        "the wrong lock is left",
    ),
    Mutant("_holding.py", 'queue.enter("enclosing", a.resource_claims)', "pass", "a group waits for what encloses it"),
    # The lock
    Mutant("locks/memory.py", "waiter.lease.release()", "pass", "granted and cancelled in one instant: held for ever"),
    Mutant("locks/memory.py", "self._last_token += 1", "self._last_token += 0", "all leases have one token"),
    Mutant(
        "locks/memory.py",
        "timeout_seconds is not None and timeout_seconds <= 0",
        "timeout_seconds is not None",
        "who has a time limit does not wait",
    ),
    Mutant("locks/memory.py", "waiter.granted.set()", "pass", "who was granted its claims is not told"),
    Mutant(
        "locks/memory.py",
        "self._leave(ticket)\n            else",
        "pass\n            else",
        "who was cancelled stays in line",
    ),
    Mutant("locks/memory.py", "del self._leases[lease.holder]", "pass", "holders without claims are remembered"),
    # The group
    Mutant(
        "_run.py",
        "in (OutcomeStatus.FAILED, OutcomeStatus.TIMED_OUT)",
        "in (OutcomeStatus.FAILED,)",
        "a timeout does not stop a group that fails fast",
    ),
    Mutant("_run.py", "late = now >= call.due", "late = False", "nobody is ever late"),
    Mutant(
        "_run.py",
        "        if not pending:\n",
        "        if False:\n",
        "an agent that cancels itself takes all others with it",
    ),
    Mutant(
        "_run.py",
        "call.scope.deadline = min(call.scope.deadline, self._grace_ends)",
        "pass",
        "the grace period never ends",
    ),
    Mutant(
        "_run.py",
        "value.usage if usage is NO_USAGE else larger(value.usage, usage)",
        "value.usage",
        "what was metered is forgotten",
    ),
    Mutant(
        "_run.py", "self._context.copy, _current", "lambda: self._context, _current", "agents share context variables"
    ),
    Mutant(
        "_run.py",
        "value.task_id != assignment.task.id or",
        "value.task_id != assignment.task.id and",
        "a result of another agent counts",
    ),
    Mutant("_run.py", "if self._depth > MAX_NESTING", "if self._depth > MAX_NESTING + 1", "groups nest too deep"),
    Mutant(
        "_run.py",
        "for dependent in self._admission.dependents_of(position):",
        "for dependent in ():",
        "who depends on a failure is not skipped",
    ),
    Mutant(
        "_run.py",
        "if scope.cancel_called:  # dismissed",
        "if False:  # dismissed",
        "an agent runs in a cancelled scope, and is taken for the caller's cancellation",
    ),
    Mutant(
        "_run.py",
        "return self._workers - self._claiming_in_vain >=",
        "return self._workers >=",
        "who waits for claims takes a place",
    ),
    Mutant("_run.py", "self._running.clear()", "pass", "an agent that was struck runs for ever"),
    Mutant("_run.py", "if raised is not None:", "if False:", "what the block raised is swallowed"),
    Mutant(
        "_run.py",
        "self._succeeded == self.group.stop_after_successes",
        "self._succeeded == -1",
        "enough is never enough",
    ),
    Mutant("_run.py", "self._is_budget_spent = True", "pass", "agents are not told that the budget is spent"),
    Mutant(
        "_run.py",
        "if self._admission.has_ready and not self._workers_suffice():",
        "if False:",
        "nobody takes the place of a worker that was spoiled",
    ),
    Mutant("_run.py", "if not own_task or is_can", "if is_can", "the next agent runs in a scope that was left open"),
    Mutant("_run.py", "if requests():", "if False:", "the next agent has another's native cancellation to answer"),
    # Shutdown
    Mutant(
        "_shutdown.py",
        "run.begin_shutdown(self.strategy.grace_seconds)",
        "run.begin_shutdown(0.0)",
        "there is no grace period",
    ),
    Mutant("_shutdown.py", "while self._runs:", "if self._runs:", "cleaning up begins with the first group's end"),
    Mutant(
        "_shutdown.py",
        "move_on_after(self.strategy.cleanup_seconds, shield=True)",
        "move_on_after(self.strategy.cleanup_seconds)",
        "cleaning up is cancelled",
    ),
    Mutant("_shutdown.py", "finished &= await", "finished = await", "a cleanup that failed is forgotten"),
    Mutant("_shutdown.py", "if self.received_signal is None:", "if True:", "a second signal does nothing"),
    # What agents leave behind
    Mutant("_traces.py", "if around._cancel_called:", "if False:", "agents start in a scope that is cancelled"),
    Mutant("_traces.py", "Fitness.HOLDS_A_SCOPE  #", "Fitness.FIT  #", "a task is used again in which a scope is open"),
    Mutant("_traces.py", "self.fitness = Fitness.SPOILED  #", "return False  #", "who finds a task ends its group"),
    Mutant("_run.py", "elif takes_any_value:", "elif True:", "an engine may return anything"),
    # Streams
    Mutant("_stream.py", " or len(self._ended) >= self._most", "", "outcomes that nobody takes pile up"),
    Mutant(
        "_stream.py",
        "move_on_after(CLOSE_SECONDS, shield=True)",
        "move_on_after(CLOSE_SECONDS)",
        "a source is not closed",
    ),
    Mutant("_stream.py", "if assignment.task_id in self._task_ids:", "if False:", "two tasks have one id"),
    Mutant("_stream.py", "self._agent_ids.discard(assignment.agent_id)", "pass", "an agent can come only once"),
    Mutant("_stream.py", "self._claims.forget(position)", "pass", "what ended is remembered"),
    # Tools
    Mutant(
        "_tools.py",
        "if anyio.get_current_task().has_pending_cancellation():",
        "if False:",
        "a call that was cancelled has a result",
    ),
    Mutant(
        "_tools.py",
        "tuple(self.results[position] for position in range(len(self.calls)))",
        "tuple(self.results.values())",
        "results come in the order of completion",
    ),
    Mutant("_tools.py", "slots.release()", "pass", "a call keeps its place"),
    Mutant("_tools.py", "self.fatal.append(fatal)", "pass", "a fatal error is swallowed"),
    Mutant("_tools.py", "all_calls.cancel()", "pass", "the others go on after an order to end"),
    # Programs
    Mutant("engines/_program.py", "start_new_session=True", "start_new_session=False", "grandchildren survive"),
    Mutant("engines/_program.py", "self._signal_group(signal.SIGKILL)", "pass", "who ignores SIGTERM survives"),
    Mutant("engines/_program.py", "self._signal_group(signal.SIGTERM)", "pass", "nobody may end by himself"),
    Mutant("engines/_program.py", "self._popen.poll()", "pass", "a zombie is left"),
    Mutant(
        "engines/process.py",
        "move_on_after(grace_seconds + KILL_SECONDS, shield=True)",
        "move_on_after(grace_seconds + KILL_SECONDS)",
        "a cancelled program survives",
    ),
    Mutant(
        "engines/process.py",
        "{name: os.environ[name] for name in self._inherit_env if name in os.environ}",
        "dict(os.environ)",
        "programs see all variables",
    ),
)
