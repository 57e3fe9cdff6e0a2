"""Downloads: pins, Hugging Face client, mirror, and the manifest of verified inputs."""
