//! The name of a user of this machine.

use std::fs;

/// The name of a user, from `/etc/passwd`; `uid NUMBER` if it is not there.
pub fn local_user_name(uid: u32) -> String {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = find_user(&users, uid).map(str::to_owned);
    name.unwrap_or_else(|| format!("uid {uid}"))
}

/// The name of a user in the text of passwd(5).
fn find_user(users: &str, uid: u32) -> Option<&str> {
    let uid = uid.to_string();
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1) == Some(uid.as_str())).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_user_has_the_name_of_passwd() {
        let users = "root:x:0:0:root:/root:/bin/bash\nkim:x:1000:100::/home/kim:/bin/sh\n";
        assert_eq!(find_user(users, 1000), Some("kim"));
        assert_eq!(find_user(users, 100), None);
        assert_eq!(local_user_name(0), "root");
        assert_eq!(local_user_name(u32::MAX), "uid 4294967295");
    }
}
