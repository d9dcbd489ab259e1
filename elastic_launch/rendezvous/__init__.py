"""How nodes find each other and agree on who has which rank."""

from elastic_launch.config import BUILT_IN as BUILT_IN
