"""A sum of the sites' vectors of which nobody learns a term: SecAgg+ (Bell et al. 2020, semi-honest variant) on Bonawitz et al. 2017.

What both sides agree on: the round (`setting`), the graph (`graph`), shares (`sharing`), keys (`agreement`), masks (`masks`), fixed point
(`quantisation`) and messages (`messages`). A site's side is `client.secure_sum`, the coordinator's `server.secure_sum`; what is promised against
whom stands in `setting`, and only there.
"""
