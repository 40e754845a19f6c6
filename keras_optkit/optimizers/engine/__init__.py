"""How updates are made: pure functions over one typed state, run on the backend's variables by `run`."""
