"""Encoding once what training reads many times: prompts to embeddings, videos to latents."""
