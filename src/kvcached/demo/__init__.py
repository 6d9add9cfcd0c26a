"""``kvcached demo``: two real models share one memory budget, static split against elastic.

``model`` finds and converts the weights, ``device`` says where they go and ``speed`` how fast that
is, ``workload`` makes the requests, ``engine`` is a plain continuous-batching loop, ``worker`` the
process around it, ``process`` that process seen from outside, ``run`` the sequence of phases,
``figures`` what was measured, ``verify`` the token comparison, ``live``, ``card`` and ``svg`` how
it is shown. It is a demonstration, not a server.
"""
