"""One file a family. Whatever `Family` a file here defines is known to the package; there is no list to add it to."""
