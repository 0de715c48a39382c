"""The methods, as one table of parts (evidence, form, solver, update), and the verbs on a row: match, choose."""
