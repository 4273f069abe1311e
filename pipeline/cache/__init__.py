"""The score cache: content-addressed store, writer, reader, manifest, fingerprints."""
