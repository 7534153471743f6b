"""Engines: what one agent does."""

from ._protocol import AgentEngine as AgentEngine
from .function import FunctionEngine as FunctionEngine

__all__ = ["AgentEngine", "FunctionEngine"]
