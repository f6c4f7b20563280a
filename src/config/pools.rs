//! The tables `[pools.NAME]`, of the daemon's configuration and that of `sheave csi`.

use std::collections::BTreeMap;

use serde::Deserialize;
use sheave_core::parse_size;
use sheave_pools::{PoolConfig, Pools, Site};
use toml::{Spanned, Value};

use super::{BadConfig, File};

/// The keys of one pool.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PoolKeys {
    url: Option<Spanned<Value>>,
    volumes: Option<Spanned<Value>>,
    shared: Option<Spanned<Value>>,
    trust_attacher: Option<Spanned<Value>>,
    capacity: Option<Spanned<Value>>,
    max_size: Option<Spanned<Value>>,
    default_size: Option<Spanned<Value>>,
}

impl File<'_> {
    pub(super) fn pools(
        &self,
        tables: BTreeMap<Spanned<String>, PoolKeys>,
    ) -> Result<Vec<PoolConfig>, BadConfig> {
        let mut pools = Vec::new();
        for (name, keys) in tables {
            let place = name.span();
            let Some(url_place) = keys.url.as_ref().or(keys.volumes.as_ref()).map(Spanned::span)
            else {
                let why =
                    "missing field `url`, where its volumes are, or `volumes`, a list of them";
                return Err(self.bad(place, why));
            };
            let expected = "expected a URL such as \"file:///var/lib/images\"";
            let url = self.value(keys.url, expected, |value| value.as_str().map(str::to_owned));
            let pool = PoolConfig {
                name: name.into_inner(),
                url: url?.unwrap_or_default(),
                volumes: self.listed(keys.volumes)?,
                shared: self.switch(keys.shared)?,
                trust_attacher: self.switch(keys.trust_attacher)?,
                capacity: self.size(keys.capacity)?,
                max_size: self.size(keys.max_size)?,
                default_size: self.size(keys.default_size)?,
            };
            // What is wrong with the pool as a whole: mostly its URL.
            Pools::new(std::slice::from_ref(&pool), &Site::default()).map_err(|error| {
                let is_named = error.to_string().contains("name");
                self.bad(if is_named { place } else { url_place }, &error.to_string())
            })?;
            pools.push(pool);
        }
        Ok(pools)
    }

    fn listed(&self, value: Option<Spanned<Value>>) -> Result<BTreeMap<String, String>, BadConfig> {
        let expected = "expected names with a VOLUME each, such as { db = \"nbd://host/db\" }";
        let texts = |value: &Value| -> Option<BTreeMap<String, String>> {
            let table = value.as_table().filter(|table| !table.is_empty())?;
            let text = |(name, text): (&String, &Value)| {
                text.as_str().map(|text| (name.clone(), text.to_owned()))
            };
            table.iter().map(text).collect()
        };
        Ok(self.value(value, expected, texts)?.unwrap_or_default())
    }

    fn switch(&self, value: Option<Spanned<Value>>) -> Result<bool, BadConfig> {
        let found = self.value(value, "expected true or false", Value::as_bool)?;
        Ok(found.unwrap_or(false))
    }

    fn size(&self, value: Option<Spanned<Value>>) -> Result<Option<u64>, BadConfig> {
        self.value(value, "expected a size such as \"100G\"", |value| {
            value.as_str().and_then(|text| parse_size(text).ok()).filter(|size| *size > 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str) -> Result<Vec<PoolConfig>, String> {
        let file = File { path: Path::new("f.toml"), text };
        file.config().map(|config| config.pools).map_err(|error| error.to_string())
    }

    #[test]
    fn pools_have_names_and_urls() {
        let text = "[pools.fast]\nurl = \"file:///images\"\ncapacity = \"10G\"\n\
                    [pools.slow-1]\nurl = \"file:///mnt\"\ndefault_size = \"5M\"\n";
        let pools = parse(text).unwrap();
        assert_eq!(pools.len(), 2);
        assert_eq!((pools[0].name.as_str(), pools[0].capacity), ("fast", Some(10 << 30)));
        assert_eq!((pools[1].url.as_str(), pools[1].default_size), ("file:///mnt", Some(5 << 20)));
        assert_eq!(parse("shards = 1").unwrap(), []);
        let text = "[pools.own.volumes]\ndb = \"nbd://h/db\"\nq = \"nbd+exec:?command=x\"\n";
        let pools = parse(text).unwrap();
        assert_eq!((pools[0].url.as_str(), pools[0].volumes["db"].as_str()), ("", "nbd://h/db"));
    }

    #[test]
    fn what_is_wrong_with_a_pool_is_said_with_its_place() {
        for (text, place, why) in [
            ("[pools.fast]\nurl = 5", "f.toml:2: ", "file:///"),
            ("[pools.fast]\nurl = \"/images\"", "f.toml:2: ", "file:///"),
            ("[pools.fast]\nurl = \"file:///i\"\ncapacity = 5", "f.toml:3: ", "100G"),
            ("[pools.fast]\nurl = \"file:///i\"\ncapacity = \"0\"", "f.toml:3: ", "100G"),
            (
                "[pools.fast]\nurl = \"file:///i\"\nmax_size = \"1G\"\ndefault_size = \"2G\"",
                "f.toml:2: ",
                "max_size",
            ),
            ("[pools.fast]\nurl = \"nbd://s/disk\"", "f.toml:2: ", "without an export"),
            ("[pools.fast]\nurl = \"nbd://s\"\nshared = true", "f.toml:2: ", "of directories"),
            ("[pools.fast]\nurl = \"file:///i\"\nshared = 1", "f.toml:3: ", "true or false"),
            ("[pools.Fast]\nurl = \"file:///i\"", "f.toml:1: ", "a to z"),
            ("[pools.fast]\nsize = \"1G\"", "f.toml:2: ", "unknown field"),
            ("[pools.fast]\n", "f.toml:1: ", "missing field `url`"),
            ("[pools.own]\nvolumes = {}", "f.toml:2: ", "a VOLUME each"),
            ("[pools.own]\nvolumes = { a = 5 }", "f.toml:2: ", "a VOLUME each"),
            ("[pools.own]\nvolumes = { a = \"a.img\" }", "f.toml:2: ", "from / on"),
            (
                "[pools.own]\nurl = \"file:///i\"\nvolumes = { a = \"/a\" }",
                "f.toml:2: ",
                "both url and volumes",
            ),
            ("[pools.own]\nshared = true\nvolumes = { a = \"/a\" }", "f.toml:3: ", "a list has"),
            ("pools = 5", "f.toml:1: ", "map"),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.starts_with(place) && said.contains(why), "{text}: {said}");
        }
    }
}
