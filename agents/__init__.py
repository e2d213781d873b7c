"""What is built on top of `LLM`: tools, the agent loop, conversations, context."""
