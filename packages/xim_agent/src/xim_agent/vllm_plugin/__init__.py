"""What runs inside vLLM's own environment: standard library only, and nothing of the agent.

This directory goes on vLLM's path as it is, so that its modules are found there without an installation: by name
(`xim_vllm_launch`, ...), and by the entry point in the `.dist-info` directory beside them, which vLLM looks for in
every one of its processes.
"""
