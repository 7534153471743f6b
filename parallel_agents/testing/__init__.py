"""For the tests of people who write their own engines, locks and agents. Needs pytest; nothing else imports it.

``parallel_agents.testing.chat`` has a chat server whose replies are scripted, and needs the extra ``chat``.
"""

from .locks import ClaimLockContract as ClaimLockContract
from .locks import ResourceLockContract as ResourceLockContract
from .scripted import Act as Act
from .scripted import Call as Call
from .scripted import ScriptedEngine as ScriptedEngine

__all__ = ["Act", "Call", "ClaimLockContract", "ResourceLockContract", "ScriptedEngine"]
