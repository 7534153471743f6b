"""The picture of a run: when each agent waited and ran, and what came of it, as a page, an image or a trace.

``_timeline.facts`` says what is to be seen; the other modules draw it, each in a format of its own.
"""
