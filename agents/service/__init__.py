"""The chat service: conversations, history and cost over HTTP."""
