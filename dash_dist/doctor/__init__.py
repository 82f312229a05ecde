"""`dash-dist doctor`: is this machine, or this cluster, fit for a run?

Knows how to try out what a run needs, part by part, and what to do where a part fails; does not train. Every check that
could hang runs in processes of its own, which are ended by their ids when its time is over.
"""

from dash_dist.doctor.findings import Finding, Status
from dash_dist.doctor.runner import Report, diagnose
from dash_dist.doctor.site import Site

__all__ = ["Finding", "Report", "Site", "Status", "diagnose"]
