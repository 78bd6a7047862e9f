"""The doctor: what is wrong with a node and its surroundings, and what to do about it."""

from aci_p2p.doctor.diagnosis import ORDER, diagnose
from aci_p2p.doctor.findings import Finding, Level
from aci_p2p.doctor.subject import Subject, find_subject

__all__ = ["ORDER", "Finding", "Level", "Subject", "diagnose", "find_subject"]
