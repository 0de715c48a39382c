"""What can be asked for: every option declared once, in frozen groups that check themselves.

`declare` is the mechanism (an option, a group, a request), `groups` has the groups of a port, `studies` those of what
measures, `requests` what each public function takes. The command line, recipes and Python build the same objects.
Only the standard library is needed, so help costs next to nothing.
"""
