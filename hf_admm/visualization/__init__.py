"""A run as one page: what it logged, where its zeros are, what they do to activations.

`logs`, `notes`, `weights` and `activations` find figures, `gathering` puts them together; `curves` and `pictures` draw
them; `sections` says what the page shows of them, and `page` writes it as HTML. matplotlib is imported when something
is drawn. Nothing here trains, or changes a weight.
"""
