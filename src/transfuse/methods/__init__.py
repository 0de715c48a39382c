"""The methods, as one table of parts, and the verbs on a row: match two bases, choose a method, test what was found."""
