//! The parameters of classes: `pool`, `front`, `limit-bps`, `limit-iops`, `force-unstage-after`.

use std::collections::HashMap;
use std::time::Duration;

use sheave_control::v1 as api;
use sheave_core::{parse_digits, parse_size};
use sheave_node::{Front, parse_force_unstage_after};
use tonic::Status;

use crate::context::{FORCE_UNSTAGE_AFTER, FRONT};

const POOL: &str = "pool";
const LIMIT_BPS: &str = "limit-bps";
const LIMIT_IOPS: &str = "limit-iops";
/// What lifts a limit, beside 0.
const NO_LIMIT: &str = "none";
/// Sidecars add what they know of the claim.
const OF_SIDECARS: &str = "csi.storage.k8s.io/";

/// What a class says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters {
    pub(super) pool: Option<String>,
    pub(super) front: Option<Front>,
    /// Bytes per second; 0 is no limit.
    pub(super) limit_bps: Option<u64>,
    /// Ops per second; 0 is no limit.
    pub(super) limit_iops: Option<u64>,
    pub(super) force_unstage_after: Option<Duration>,
}

impl Parameters {
    /// Mutable ones count more than those of the same name.
    ///
    /// # Errors
    /// INVALID_ARGUMENT with the parameter's name.
    pub(super) fn new(
        parameters: &HashMap<String, String>,
        mutable: &HashMap<String, String>,
    ) -> Result<Self, Status> {
        let mut all = Self::default();
        for (key, value) in parameters {
            all.take(key, value, false)?;
        }
        for (key, value) in mutable {
            all.take(key, value, true)?;
        }
        Ok(all)
    }

    fn take(&mut self, key: &str, value: &str, mutable: bool) -> Result<(), Status> {
        let invalid = |why: &str| Err(Status::invalid_argument(format!("parameter {key}: {why}")));
        match key {
            LIMIT_BPS => match limit(value, |text| parse_size(text).ok()) {
                Some(limit) => self.limit_bps = Some(limit),
                None => return invalid("write bytes per second, such as 100M, or none"),
            },
            LIMIT_IOPS => match limit(value, parse_digits) {
                Some(limit) => self.limit_iops = Some(limit),
                None => return invalid("write requests per second, such as 5000, or none"),
            },
            POOL | FRONT | FORCE_UNSTAGE_AFTER if mutable => {
                return invalid("it cannot be changed; make another class");
            }
            POOL => self.pool = Some(value.to_owned()),
            FRONT => match Front::of_name(value) {
                Some(front) => self.front = Some(front),
                None => return invalid(&format!("write {}", Front::FORM)),
            },
            FORCE_UNSTAGE_AFTER => match parse_force_unstage_after(value) {
                Some(after) => self.force_unstage_after = Some(after),
                None => {
                    return invalid(&format!("write {}", sheave_node::FORCE_UNSTAGE_AFTER_FORM));
                }
            },
            _ if key.starts_with(OF_SIDECARS) => {}
            _ => {
                let key: String = key.chars().take(64).collect();
                let known = [POOL, FRONT, LIMIT_BPS, LIMIT_IOPS, FORCE_UNSTAGE_AFTER].join(", ");
                let why = format!("no parameter is called {key:?}; known: {known}");
                return Err(Status::invalid_argument(why));
            }
        }
        Ok(())
    }

    /// The pool that is meant: the only one, if none is named.
    ///
    /// # Errors
    /// INVALID_ARGUMENT with the names that there are.
    pub(super) fn pool<'a>(&self, pools: &'a [api::Pool]) -> Result<&'a api::Pool, Status> {
        let found = match (&self.pool, pools) {
            (Some(name), _) => pools.iter().find(|pool| pool.name == *name),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        found.ok_or_else(|| {
            let names: Vec<_> = pools.iter().map(|pool| pool.name.as_str()).collect();
            let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let named = self.pool.iter().map(|name| format!("there is no {name:?}; "));
            let named: String = named.collect();
            let why = format!("parameter {POOL}: {named}name a pool of the configuration: {known}");
            Status::invalid_argument(why)
        })
    }

    /// What is kept with the volume: all that makes two wishes the same.
    pub(super) fn kept(&self) -> HashMap<String, String> {
        let number = |number: u64| number.to_string();
        [
            (FRONT, self.front.map(|front| front.name().to_owned())),
            (LIMIT_BPS, self.limit_bps.map(number)),
            (LIMIT_IOPS, self.limit_iops.map(number)),
            (FORCE_UNSTAGE_AFTER, self.force_unstage_after.map(|after| number(after.as_secs()))),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect()
    }
}

fn limit(text: &str, parse: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    if text == NO_LIMIT { Some(0) } else { parse(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map<const N: usize>(pairs: [(&str, &str); N]) -> HashMap<String, String> {
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn rule_03_mutable_parameters_count_more() {
        let parameters = map([("pool", "fast"), ("limit-bps", "1M"), ("limit-iops", "500")]);
        let mutable = map([("limit-bps", "2M")]);
        let all = Parameters::new(&parameters, &mutable).unwrap();
        assert_eq!((all.limit_bps, all.limit_iops), (Some(2 << 20), Some(500)));
        assert_eq!(all.kept(), map([("limit-bps", "2097152"), ("limit-iops", "500")]));
    }

    #[test]
    fn parameters_that_are_unknown_or_wrong_are_refused_by_name() {
        for (key, value) in [
            ("pol", "fast"),
            ("front", "scsi"),
            ("limit-bps", "fast"),
            ("limit-iops", "-1"),
            ("force-unstage-after", "9"),
        ] {
            let refused = Parameters::new(&map([(key, value)]), &map([])).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
            assert!(refused.message().contains(key), "{refused}");
        }
        for key in ["pool", "front", "force-unstage-after"] {
            assert!(Parameters::new(&map([]), &map([(key, "auto")])).is_err(), "{key}");
        }
        let added = map([("csi.storage.k8s.io/pvc/name", "data")]);
        assert_eq!(Parameters::new(&added, &map([])).unwrap(), Parameters::default());
    }

    #[test]
    fn a_pool_is_named_unless_there_is_only_one() {
        let pool = |name: &str| api::Pool { name: name.to_owned(), ..api::Pool::default() };
        let (one, two) = ([pool("fast")], [pool("fast"), pool("slow")]);
        let none = Parameters::default();
        assert_eq!(none.pool(&one).unwrap().name, "fast");
        let refused = none.pool(&two).unwrap_err();
        assert!(refused.message().contains("fast, slow"), "{refused}");
        let slow = Parameters { pool: Some("slow".to_owned()), ..none };
        assert_eq!(slow.pool(&two).unwrap().name, "slow");
        assert!(slow.pool(&one).is_err());
    }
}
