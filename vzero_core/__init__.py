"""Pure gating, loss and view logic of V-Zero: torch, pydantic and the standard library; no I/O, no clock, no state."""
