"""The HTTP door: an OpenAI Batch API over the Store and Blobs ports; it names no adapter."""
