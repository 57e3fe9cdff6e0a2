"""Evidence about a build: run records, dvc.yaml and dvc.lock, code closure, the opened rebuild, bundle, statement, signature."""
