"""Run groups of agents in parallel with structured concurrency, on asyncio and trio."""
