"""The reference system: a small long-context sparse multimodal model, and its recall measured to ten million tokens."""
