"""Evidence about a build: run records, dvc.yaml and dvc.lock, code closure, bundle, statement, signature."""
