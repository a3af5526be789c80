"""Speech chat: messages, tools and the reply engine."""
