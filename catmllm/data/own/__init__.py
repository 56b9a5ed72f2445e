"""Users' own structures, in any format, as systems: the one reader behind `catmllm data import`, `predict`,
`design --from` and `evaluate`.

`files` turns any path into records, `keys` says what a column means, `adsorbates` which atoms are the
adsorbate, `surfaces` how the slab stands, `references` what turns a total energy into an adsorption energy,
`reading` makes systems of records and counts what it refuses.
"""
