//! Which file of an image describes the VM's hardware.

use xot::Xot;

use super::DriverError;

/// Longest hardware description that is read, in bytes.
pub const MOST_DEFINITION: u64 = 1024 * 1024;

/// A libvirt domain definition that came with an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// Its file.
    pub file: String,
    /// What is in it.
    pub xml: String,
}

impl Definition {
    /// The definition among an image's `*.xml` files, each given with its content. None of them is one: none.
    ///
    /// Fails if several are: which is meant would be a guess.
    pub fn among(files: Vec<(String, String)>) -> Result<Option<Self>, DriverError> {
        let mut found: Vec<Self> = files
            .into_iter()
            .filter(|(_, xml)| is_domain(xml))
            .map(|(file, xml)| Self { file, xml })
            .collect();
        let one = found.pop();
        match (one, found.is_empty()) {
            (one, true) => Ok(one),
            (one, false) => {
                let names: Vec<String> = found.into_iter().chain(one).map(|it| it.file).collect();
                Err(DriverError::Definition(format!(
                    "the image has several domain definitions ({}): leave one in it",
                    names.join(", ")
                )))
            }
        }
    }
}

fn is_domain(xml: &str) -> bool {
    let mut xot = Xot::new();
    let Ok(root) = xot.parse(xml) else { return false };
    xot.document_element(root).is_ok_and(|element| xot.node_name(element) == xot.name("domain"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_domain_is_found_and_several_are_refused() {
        let file = |name: &str, xml: &str| (name.to_owned(), xml.to_owned());
        let domain =
            "<?xml version='1.0'?>\n<!-- made by hand -->\n<domain type='kvm'><name>a</name></domain>";
        let found = Definition::among(vec![file("net.xml", "<network/>"), file("vm.xml", domain)]).unwrap();
        assert_eq!(found.unwrap().file, "vm.xml");
        assert_eq!(Definition::among(vec![file("x.xml", "no xml"), file("y.xml", "")]).unwrap(), None);
        let error = Definition::among(vec![file("a.xml", domain), file("b.xml", domain)]).unwrap_err();
        assert!(error.to_string().contains("a.xml, b.xml"), "{error}");
    }
}
