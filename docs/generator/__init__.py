"""One module per kind of generated page; `docs.generate` puts them where they belong."""
