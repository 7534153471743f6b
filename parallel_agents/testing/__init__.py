"""For the tests of people who write their own engines, locks and agents. Needs pytest; nothing else imports it.

``parallel_agents.testing.chat`` has a chat server whose replies are scripted, and needs the extra ``chat``;
``parallel_agents.testing.plugin`` has fixtures, which pytest finds by itself.
"""

from .cancellation import cancel_at_every_checkpoint as cancel_at_every_checkpoint
from .engines import AgentEngineContract as AgentEngineContract
from .journals import JournalContract as JournalContract
from .locks import ClaimLockContract as ClaimLockContract
from .locks import ResourceLockContract as ResourceLockContract
from .outcomes import assert_all_succeeded as assert_all_succeeded
from .outcomes import assert_outcomes as assert_outcomes
from .remote import RemoteEngineContract as RemoteEngineContract
from .scripted import Act as Act
from .scripted import Call as Call
from .scripted import ScriptedEngine as ScriptedEngine
from .stepping import DeadlockError as DeadlockError
from .stepping import virtual_time as virtual_time

__all__ = [
    "Act",
    "AgentEngineContract",
    "Call",
    "ClaimLockContract",
    "DeadlockError",
    "JournalContract",
    "RemoteEngineContract",
    "ResourceLockContract",
    "ScriptedEngine",
    "assert_all_succeeded",
    "assert_outcomes",
    "cancel_at_every_checkpoint",
    "virtual_time",
]
