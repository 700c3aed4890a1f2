"""
The study of accuracy: tasks x methods x patterns x seeds, on one model, each run a line in a file.

`tasks` and `methods` say what is compared, `runs` trains one, `lines` keeps what came out, `figures` sums it up and
`report` writes it down. `benchmarks.accuracy` and `benchmarks.activation_maps` are the commands.
"""
