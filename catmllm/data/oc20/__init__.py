"""OC20 on disk, in every layout that its users have, to shards that training reads: `catmllm data oc20`.

`pickles` loads untrusted pickles, `readers` turns any file into records, `metadata` says what the mappings
say of a record, `process` filters records into systems and runs over all files, `overview` shows what came
out.
"""
