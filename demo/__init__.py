"""The demo: router, agent and a real vLLM with a tiny model, started by one command (`make demo`)."""
