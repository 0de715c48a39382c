"""What lies on disk: checkpoints in every format that is read, vocabularies, configs; and writing, all or nothing.

`opening` opens a folder, a file, a hub id or a state dict as a `checkpoint`, lazily: `folders` says what lies where,
`hub` fetches, `weights` and `reading` read files. `writing` writes a model folder atomically.
`vocabulary` reads tokens, `configs` completes configs, `open_clip` says which tensor there is which in transformers.
"""
